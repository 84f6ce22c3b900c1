"""The command from its options to its exit status."""

import asyncio
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest

from benchmarks.loadgen.main import main
from benchmarks.loadgen.progress import progress_line, show_progress
from benchmarks.loadgen.report import Report

from .scripted_server import Answer, Script, ScriptedServer, serving_in_thread, until

ROOT = Path(__file__).parents[2]
SMALL = ["--concurrency", "4", "--requests", "8", "--input-tokens", "4:9", "--output-tokens", "2:3"]


def good(index: int, body: dict[str, Any]) -> Answer:
    return Answer(cached_tokens=1, headers={"x-reprise-route": f"worker=w{index % 2}; hit_gpu=1; reason=r"})


def run(options: Sequence[str], script: Script = good, **server: Any) -> tuple[int, ScriptedServer]:
    with serving_in_thread(ScriptedServer(script, **server)) as scripted:
        return main(["--url", scripted.url, *options]), scripted


def refused(capsys: pytest.CaptureFixture[str], *options: str) -> str:
    """The one line that says why the command did not start."""
    with pytest.raises(SystemExit) as caught:
        main(options)
    assert caught.value.code == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    return error


# ---- a run ----


def test_a_run_prints_its_table_and_exits_with_0(capsys: pytest.CaptureFixture[str]) -> None:
    status, server = run(SMALL)
    output = capsys.readouterr()
    assert status == 0
    assert len(server.bodies) == 8
    assert re.search(r"sent 8 +ok 8 +error 0 +shed \(429\) 0 +disconnected 0", output.out)
    assert re.search(r"TTFT +\d", output.out)
    assert "w0 4, w1 4" in output.out
    assert output.err == ""  # no progress bar where nobody looks


def test_the_json_has_every_field_of_the_schema_and_names_its_origin(tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    options = [*SMALL, "--json", str(path), "--seed", "5", "--label", "peer 1.2", "--slo-ttft-ms", "9e9"]
    assert run([*options, "--dollars-per-hour", "2"])[0] == 0
    report = msgspec.json.decode(path.read_bytes(), type=Report, strict=True)
    assert report.schema == 1
    assert report.environment.command[2:] == [
        "--url",
        report.environment.url,
        *options,
        "--dollars-per-hour",
        "2",
    ]
    assert (report.environment.seed, report.environment.label, report.environment.model) == (
        5,
        "peer 1.2",
        "fake",
    )
    assert report.goodput is not None
    assert report.goodput.share_of_sent == 1
    assert len(report.rows) == report.requests.ok == 8
    assert list(tmp_path.iterdir()) == [path]


def test_the_fields_of_the_json_are_those_of_schema_1(tmp_path: Path) -> None:
    """A field that goes or changes its name breaks who reads the files: raise SCHEMA and say so."""
    path = tmp_path / "report.json"
    run([*SMALL, "--json", str(path), "--slo-ttft-ms", "1", "--dollars-per-hour", "2"])
    report = json.loads(path.read_text())
    fields = {name: " ".join(value) for name, value in report.items() if isinstance(value, dict)}
    quantiles = "count mean p50 p90 p99"
    assert " ".join(report) == (
        "schema environment interrupted duration_s requests errors ttft_ms tpot_ms itl_ms e2e_ms tokens "
        "throughput goodput routing cost generator warnings rows"
    )
    assert fields == {
        "environment": "command label started url model api workload pace seed versions machine",
        "requests": "sent ok error shed disconnected cancelled turns_not_sent",
        "errors": "",
        "ttft_ms": quantiles,
        "tpot_ms": quantiles,
        "itl_ms": quantiles,
        "e2e_ms": quantiles,
        "tokens": "input output cached per_chunk estimated",
        "throughput": "requests_per_s input_tok_s out_tok_s total_tok_s",
        "goodput": "slo_ttft_ms slo_tpot_ms requests_per_s share_of_sent",
        "routing": "workers max_over_mean reasons hit_tokens uncached_tokens predicted_hit_tokens "
        "ttft_above_prediction_ms",
        "cost": "dollars_per_hour output_tokens_per_dollar total_tokens_per_dollar "
        "dollars_per_million_output_tokens",
        "generator": "cpu_share send_lag_ms peak_in_flight",
    }
    assert " ".join(report["rows"][0]) == (
        "session turn outcome error status due_s sent_s end_s ttft_ms tpot_ms input_tokens output_tokens "
        "cached_tokens finish_reason route"
    )


def test_the_same_seed_sends_the_same_prompts_at_any_pace() -> None:
    bodies = [
        sorted(str(body["prompt"]) for body in run(["--seed", seed, *pace, *SMALL[2:]])[1].bodies)
        for seed, pace in (
            ("1", ["--concurrency", "2"]),
            ("1", ["--rate", "inf"]),
            ("2", ["--concurrency", "2"]),
        )
    ]
    assert bodies[0] == bodies[1] != bodies[2]


def test_no_request_is_sent_before_it_is_due(tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    assert run(["--rate", "400", "--requests", "80", "--output-tokens", "1", "--json", str(path)])[0] == 0
    rows = json.loads(path.read_text())["rows"]
    assert len(rows) == 80
    assert [row for row in rows if row["sent_s"] < row["due_s"]] == []


def test_a_trace_is_replayed_with_equal_prompts_for_equal_hash_ids(tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl"
    line = {"timestamp": 0, "input_length": 600, "output_length": 16, "hash_ids": [0, 1]}
    path.write_text("".join(json.dumps(line | {"timestamp": at, "hash_ids": [0, last]}) + "\n"
                            for at, last in ((0, 1), (20, 2), (40, 1))))  # fmt: skip
    status, server = run(["--workload", f"trace:{path}", "--length-scale", "0.125", "--time-scale", "0.5"])
    first, second, third = (body["prompt"] for body in server.bodies)
    assert status == 0
    assert first == third
    assert first[:64] == second[:64]
    assert first[64:] != second[64:]
    assert [body["max_tokens"] for body in server.bodies] == [2, 2, 2]


def test_conversations_go_through_chat_unless_told_otherwise() -> None:
    options = [
        "--workload",
        "conversation",
        "--concurrency",
        "2",
        "--sessions",
        "2",
        "--turns",
        "2",
        "--output-tokens",
        "2",
    ]
    assert all("messages" in body for body in run(options)[1].bodies)
    assert all("prompt" in body for body in run([*options, "--api", "completions"])[1].bodies)


def test_warm_up_is_sent_before_and_not_counted(tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    status, server = run([*SMALL, "--warmup", "3", "--json", str(path)])
    assert status == 0
    assert len(server.bodies) == 11
    assert json.loads(path.read_text())["requests"]["sent"] == 8


def test_a_picture_is_drawn_when_asked_for(tmp_path: Path) -> None:
    path = tmp_path / "run.png"
    some_shed = lambda index, body: Answer(status=429) if index % 3 == 1 else Answer()  # noqa: E731
    assert run([*SMALL, "--plot", str(path), "--slo-ttft-ms", "100"], some_shed)[0] == 0
    assert path.read_bytes().startswith(b"\x89PNG")
    assert run([*SMALL, "--plot", str(path)], lambda index, body: Answer(status=500))[0] == 1


# ---- exit status ----


def every_fourth(answer: Answer) -> Script:
    return lambda index, body: answer if index % 4 == 3 else Answer()


@pytest.mark.parametrize(
    "answer", [Answer(status=500, message="boom"), Answer(ending="cut"), Answer(ending="no_done")]
)
def test_errors_above_the_allowed_rate_exit_with_1(
    answer: Answer, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(SMALL, every_fourth(answer))[0] == 1
    assert "serve.py: failed: error rate 25.00% is above --max-error-rate 0.00%" in capsys.readouterr().err
    assert run([*SMALL, "--max-error-rate", "0.25"], every_fourth(answer))[0] == 0


def test_shed_requests_are_shown_but_are_no_errors(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(SMALL, every_fourth(Answer(status=429, message="queue full")))[0] == 0
    output = capsys.readouterr().out
    assert "shed (429) 2" in output
    assert "2 × HTTP 429: queue full" in output


def test_verify_fails_a_server_whose_usage_is_wrong() -> None:
    assert run([*SMALL, "--verify"])[0] == 0
    assert run([*SMALL, "--verify"], lambda index, body: Answer(usage_excess=1))[0] == 1
    assert run(SMALL, lambda index, body: Answer(usage_excess=1))[0] == 0


def test_ctrl_c_prints_and_writes_what_there_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupting(index: int, body: dict[str, Any]) -> Answer:
        if index == 7:  # four at a time: the first four have ended
            os.kill(os.getpid(), signal.SIGINT)
        return Answer() if index < 4 else Answer(first_token_s=60)

    path = tmp_path / "report.json"
    status, _ = run(
        [*["--concurrency", "4", "--duration", "60", "--output-tokens", "2", "--json"], str(path)],
        interrupting,
    )
    assert status == 130
    assert "interrupted" in capsys.readouterr().out
    report = json.loads(path.read_text())
    assert report["interrupted"] is True
    assert report["requests"]["ok"] == 4
    assert report["requests"]["cancelled"] == report["requests"]["sent"] - 4 > 0
    assert report["requests"]["error"] == 0


def test_the_script_runs_from_a_shell() -> None:
    with serving_in_thread(ScriptedServer(good)) as server:
        command = [sys.executable, "benchmarks/serve.py", "--url", server.url, *SMALL]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert "ok 8" in done.stdout


# ---- what cannot start ----


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ("", "give --rate or --concurrency"),
        ("--rate 1 --concurrency 1", "not allowed with argument"),
        ("--rate 0", "--rate: must be a positive number or inf, got '0'"),
        ("--concurrency 1.5", "--concurrency: must be a whole number from 1 to 1e9, got '1.5'"),
        ("--concurrency 1 --input-tokens 9:3", "--input-tokens: must be A:B with A ≤ B, got '9:3'"),
        ("--concurrency 1 --input-tokens 0", "--input-tokens: must be a whole number from 1"),
        ("--concurrency 1 --arrival fixed", "--arrival has no effect without --rate"),
        ("--concurrency 1 --turns 3", "--turns has no effect with --workload random"),
        ("--concurrency 1 --workload conversation --requests 3", "--requests has no effect with"),
        ("--concurrency 1 --workload sharegpt", "--workload must be random, shared-prefix, conversation or"),
        ("--workload trace:", "--workload must be"),
        ("--workload trace:/no/such/file", "No such file or directory: '/no/such/file'"),
        ("--rate inf --duration 3", "--rate inf needs a number of requests"),
        ("--concurrency 1 --url localhost:1", "--url: 'localhost:1' is not http://host:port"),
        ("--concurrency 1 --json /no/such/folder/x", "--json: folder /no/such/folder does not exist"),
        ("--concurrency 1 --plot run.txt", "--plot: must end in .png, .svg or .pdf, got 'run.txt'"),
        ("--concurrency 1 --extra-body []", "--extra-body: must be a JSON object"),
        ("--concurrency 1 --max-error-rate 2", "--max-error-rate: must be from 0 to 1, got '2'"),
        ("--concurrency 1 --vocab-size 9", "--vocab-size: must be a whole number from 256"),
    ],
)
def test_a_bad_option_is_refused_in_one_line(
    options: str, complaint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert complaint in refused(capsys, *options.split())


def test_a_picture_without_matplotlib_is_refused_before_the_run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("benchmarks.loadgen.options.find_spec", lambda name: None)
    assert "needs matplotlib" in refused(capsys, *SMALL, "--plot", "run.png")


def test_a_server_that_is_not_there_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    with serving_in_thread(ScriptedServer(good)) as server:
        url = server.url
    assert main(["--url", url, *SMALL]) == 2
    error = capsys.readouterr().err
    assert re.fullmatch(rf"serve.py: error: {url}: cannot connect: .*\n", error)


@pytest.mark.parametrize(
    ("options", "models", "complaint"),
    [
        (["--model", "x"], [{"id": "a"}, {"id": "b"}], "has no model 'x', it has: a, b"),
        ([], [{"id": "a"}, {"id": "b"}], "has 2 models, choose by --model: a, b"),
        ([], [], "has 0 models, choose by --model: none"),
        (
            [],
            [{"id": "a", "max_model_len": 11}],
            "the longest request may have 12 tokens with its answer, a takes 11",
        ),
        (
            ["--vocab-size", "5000"],
            [{"id": "a", "vocab_size": 4000}],
            "--vocab-size 5000 is above the model's 4000",
        ),
        (["--warmup", "1", "--timeout", "1e-9"], [{"id": "a"}], "does not answer"),
    ],
)
def test_a_model_that_cannot_serve_the_run_is_refused_before_it(
    options: list[str], models: list[dict[str, Any]], complaint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    status, server = run([*SMALL, *options], models=models)
    error = capsys.readouterr().err
    assert (status, server.bodies, error.count("\n")) == (2, [], 1)
    assert complaint in error


def test_a_failing_warm_up_stops_the_run(capsys: pytest.CaptureFixture[str]) -> None:
    status, server = run([*SMALL, "--warmup", "2"], lambda index, body: Answer(status=500, message="boom"))
    assert status == 2
    assert len(server.bodies) == 2
    assert capsys.readouterr().err == "serve.py: error: a warm-up request failed: HTTP 500: boom\n"


def test_ids_stay_inside_the_vocabulary_that_the_server_tells() -> None:
    _, server = run(SMALL, models=[{"id": "tiny", "vocab_size": 300}])
    assert max(token for body in server.bodies for token in body["prompt"]) < 300


# ---- progress ----


class Terminal:
    def __init__(self) -> None:
        self.written = ""

    def isatty(self) -> bool:
        return True

    def write(self, text: str) -> None:
        self.written += text

    def flush(self) -> None: ...


def progress_of(duration_s: float | None = None, in_flight: int = 2) -> Any:
    outcomes = ["ok"] * 5 + ["shed", "cancelled", "cancelled"]
    records = [SimpleNamespace(outcome=outcome) for outcome in outcomes]
    return SimpleNamespace(records=records, in_flight=in_flight, start_s=100.0, duration_s=duration_s)


def test_progress_is_by_requests_or_by_time_and_shows_what_was_lost() -> None:
    assert progress_line(progress_of(), 12, 103.0) == (
        "[############............] 6/12 done  2 in flight  shed 1  3 s"
    )
    assert progress_line(progress_of(duration_s=12.0), None, 103.0).startswith(
        "[######..................] 6 done"
    )


async def test_a_terminal_sees_one_line_that_goes_away_at_the_end() -> None:
    terminal = Terminal()
    task = asyncio.create_task(show_progress(progress_of(), 12, terminal))  # type: ignore[arg-type]
    await until(lambda: "6/12" in terminal.written)
    task.cancel()
    await asyncio.wait([task])
    assert "\n" not in terminal.written
    assert terminal.written.endswith("\r\x1b[K")
