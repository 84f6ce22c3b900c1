"""Load generator: latency, throughput, reuse and errors of any OpenAI-compatible endpoint, side by side.

    python benchmarks/serve.py --workload shared-prefix --rate 2 --requests 64
    python benchmarks/serve.py --workload conversation --concurrency 8 --turns 6
    python benchmarks/serve.py --workload trace:FILE.jsonl --time-scale 0.5 --length-scale 0.125 --limit 200

`--help` lists the options, `loadgen/report.py` documents the JSON, `README.md` says how to compare fairly.
"""

import sys

from loadgen.main import main

if __name__ == "__main__":
    sys.exit(main())
