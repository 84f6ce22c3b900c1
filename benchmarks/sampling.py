"""What sampling costs a step on the GPU: microseconds in a CUDA graph, by rows, vocabulary and way to sample.

    python -m benchmarks.sampling [--rows 1 32 256 1024] [--vocab 49152 128256 151936]

All rows of a step sample alike. Logits are bf16, normal with a deviation of 4 (some tens of tokens hold most
of the mass, as after prose); `flat` has a deviation of 1, where top_p keeps tens of thousands. Penalties are
over 1,000 tokens. The floor is one read of the logits at 3.0 TB/s.
"""

from __future__ import annotations

import argparse
from typing import Any

import numpy as np
import torch

from kernels.sampling import SamplingTable, sample
from kernels.sampling_table import line

#: name -> deviation of the logits, log-probabilities of the step, parameters
WAYS: dict[str, tuple[float, int, dict[str, Any]]] = {
    "greedy": (4.0, -1, {"temperature": 0.0}),
    "temperature": (4.0, -1, {"temperature": 1.0}),
    "top_p top_k": (4.0, -1, {"temperature": 0.7, "top_p": 0.9, "top_k": 50}),
    "top_p": (4.0, -1, {"temperature": 1.0, "top_p": 0.9}),
    "min_p": (4.0, -1, {"temperature": 1.0, "min_p": 0.05}),
    "flat top_p": (1.0, -1, {"temperature": 1.0, "top_p": 0.9}),
    "penalties": (4.0, -1, {"temperature": 0.0, "frequency": 0.1, "presence": 0.1}),
    "logprobs 0": (4.0, 0, {"temperature": 0.0, "logprobs": 0}),
    "logprobs 20": (4.0, 20, {"temperature": 0.0, "logprobs": 20}),
}
HISTORY = 1000
CALLS = 10  # in one graph
REPLAYS = 5


def microseconds(logits: torch.Tensor, logprobs: int, how: dict[str, Any]) -> float:
    """Of one call, the best of the replays."""
    rows, vocab = logits.shape
    device = logits.device
    table = SamplingTable.empty(rows, device)
    lines = [np.frombuffer(line(prompt_length=1, **{"seed": row, **how}), np.int32) for row in range(rows)]
    table.parameters.copy_(torch.from_numpy(np.stack(lines)))
    tokens = torch.randint(0, vocab, (rows, HISTORY + 1), dtype=torch.int32, device=device)
    slots = torch.arange(rows, dtype=torch.int32, device=device)
    lengths = torch.full((rows,), HISTORY, dtype=torch.int32, device=device)

    def step() -> None:
        sample(logits, table, tokens, slots, lengths, logprobs=logprobs)

    step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(CALLS):
            step()
    times = []
    for _ in range(REPLAYS):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(float(begin.elapsed_time(end)) * 1e3 / CALLS)
    return min(times)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 32, 256, 1024])
    parser.add_argument("--vocab", type=int, nargs="+", default=[49_152, 128_256, 151_936])
    options = parser.parse_args()
    print(f"{'vocab':>7} {'rows':>5} {'floor':>7} " + " ".join(f"{name:>11}" for name in WAYS), flush=True)
    for vocab in options.vocab:
        for rows in options.rows:
            noise = torch.randn(rows, vocab, device="cuda", dtype=torch.bfloat16)
            figures = [
                microseconds(noise * deviation, logprobs, how) for deviation, logprobs, how in WAYS.values()
            ]
            floor = rows * vocab * 2 / 3.0e6
            cells = " ".join(f"{figure:11.1f}" for figure in figures)
            print(f"{vocab:7} {rows:5} {floor:7.1f} {cells}", flush=True)


if __name__ == "__main__":
    main()
