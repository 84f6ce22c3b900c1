"""The load generator behind `benchmarks/serve.py`, for any endpoint that speaks the OpenAI API.

A workload (`workload.py`, `trace.py`) is a sequence of sessions: pure data that names its tokens.
`prompts.py` writes them as request bodies, `pace.py` decides when each is sent, `http.py` and `stream.py`
send it and time the answer, `record.py` judges what came and holds it. `summary.py` turns records into the
figures of `report.py`; `table.py`, `progress.py` and `plot.py` show them. `main.py` is the command, with
`options.py`, `values.py` and `environment.py`.

Nothing here imports `services`: the same program measures any peer.
"""
