"""Loads from a store of any speed: time to first token of one long prompt that the store has.

    python -m benchmarks.loads [--model PATH] [--tokens 1500] [--repeats 3] [--json FILE]
    python -m benchmarks.loads --device cuda --model FOLDER --tokens 8192 --codec fp8 --mb-per-s 0.01 100

FOLDER has a whole checkpoint, or a config.json alone: random weights of that shape. Engines in this process,
with one torch thread, one for each way to the store: none at all, a store that has not got the prompt, then
one that has it behind a proxy that lets so many MB/s through, 0.01 standing for a store that is as good as
dead; `local` is the server's unix socket. Every repeat has a fresh prompt, computed where it is nowhere, then
asked for through every link, so that what else the machine does disturbs all of them.

`first` is the first request through a link, when nothing is known of it and much is hoped; `later` the median
of the others (what a load is worth is decided by what was measured). `best` is what no division of the work
can beat: the blocks computed at the speed of `computed`, or loaded at the link's, whichever is done sooner
at the best place to meet. `loaded` is the share of the prompt that came from the store in the last request.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Hashable
from dataclasses import dataclass, field, replace
from multiprocessing import get_context
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from random import Random
from threading import Event

import torch

from kernels.kv_payload import Codec, KVShape
from services.cache_store.embedded import LocalRedis, find_server, start_redis
from services.worker.config import EngineConfig
from services.worker.engine import Engine
from services.worker.load import LoadedModel, load_model
from services.worker.models.random import random_model
from services.worker.request import StepReport
from services.worker.store_tier import RedisStoreTier, StoreTierConfig
from tests.cache_store.proxy import SlowProxy
from tests.launch.started import DEMO_MODEL
from tests.worker.requests import make_request

MB_PER_S = (0.01, 1.0, 3.0, 6.0, 12.0, 25.0, 100.0)


@dataclass
class Way:
    """An engine and how it reaches the store."""

    name: str
    engine: Engine
    block_size: int
    store: RedisStoreTier | None = None
    bytes_per_s: float | None = None
    seconds: list[float] = field(default_factory=list)
    loaded: int = 0
    _first: Event = field(default_factory=Event)
    _ended: Event = field(default_factory=Event)
    _first_s: float = 0.0

    def start(self) -> None:
        self.engine.warm_up()
        self.engine.start(self._note)

    def ask(self, key: Hashable, prompt: list[int]) -> None:
        self._first.clear()
        self._ended.clear()
        asked_s = time.perf_counter()
        self.engine.submit(
            make_request(
                key,
                prompt,
                max_tokens=2,
                ignore_eos=True,
                arrival_s=time.monotonic(),
                block_size=self.block_size,
            )
        )
        if not self._ended.wait(300):
            sys.exit(f"loads: no answer through {self.name}")
        self.seconds.append(self._first_s - asked_s)

    def stop(self) -> None:
        self.engine.stop()
        if self.store is not None:
            self.store.close()

    def _note(self, report: StepReport) -> None:
        for output in report.outputs:
            if output.start is not None:
                self._first_s = time.perf_counter()
                self.loaded = output.start.store_tokens
            if output.finish is not None:
                if output.finish.reason != "length":
                    sys.exit(f"loads: {self.name}: {output.finish.message}")
                self._ended.set()


def main() -> int:
    options = _parser().parse_args()
    torch.set_num_threads(1)
    model = _load(options)
    config = EngineConfig.for_device(options.device, store_codec=options.codec)
    config = replace(config, pages=2 * (options.tokens // config.block_size + 2))
    setting = Setting(model, config, options.tokens, options.repeats)
    server = start_redis(find_server(), max_memory=2 * setting.stored_bytes + (256 << 20))
    proxies: list[BaseProcess] = []
    ways = [Way("computed, no store", setting.engine(None), config.block_size)]
    try:
        ways.append(setting.way("computed, not in the store", server.socket_url))
        for mb_per_s in options.mb_per_s:
            url, proxy = _start_proxy(server, mb_per_s * 1e6)
            proxies.append(proxy)
            way = setting.way(f"{mb_per_s:g} MB/s", url)
            way.bytes_per_s = mb_per_s * 1e6
            ways.append(way)
        ways.append(setting.way("local", server.socket_url))
        for way in ways:
            way.start()
        _measure(ways, setting)
    finally:
        for way in ways:
            way.stop()
        for proxy in proxies:
            proxy.kill()
            proxy.join()
        server.stop()
    _print(ways, setting)
    if options.json:
        seconds = {way.name: way.seconds for way in ways}
        options.json.write_text(json.dumps({"tokens": options.tokens, "seconds": seconds}, indent=1))
    return 0


@dataclass(frozen=True)
class Setting:
    """What all ways have in common."""

    model: LoadedModel
    config: EngineConfig
    tokens: int
    repeats: int

    @property
    def blocks(self) -> int:
        """Of one prompt."""
        return self.tokens // self.config.block_size

    @property
    def block_bytes(self) -> int:
        """As a block travels."""
        spec, size = self.model.spec, self.config.block_size
        shape = KVShape(spec.layers, spec.kv_heads, size, spec.head_dim, self.model.kv_dtype)
        return shape.payload_bytes(Codec(self.config.store_codec))

    @property
    def stored_bytes(self) -> int:
        """Of all prompts."""
        return self.repeats * (self.blocks + 1) * self.block_bytes

    def engine(self, store: RedisStoreTier | None) -> Engine:
        return Engine(self.model, self.config, store)

    def way(self, name: str, url: str) -> Way:
        spec = self.model.spec
        store = RedisStoreTier(
            StoreTierConfig(
                url=url,
                fingerprint=self.model.fingerprint,
                block_shape=(spec.layers, 2, spec.kv_heads, self.config.block_size, spec.head_dim),
                dtype=self.model.kv_dtype,
                capacity=self.stored_bytes,
                pinned=self.model.decoder.device.type == "cuda",
                codec=Codec(self.config.store_codec),
            )
        )
        return Way(name, self.engine(store), self.config.block_size, store)


def _measure(ways: list[Way], setting: Setting) -> None:
    random = Random(0)
    plain, filling, *others = ways
    for repeat in range(setting.repeats):
        prompt = [random.randrange(100, 30_000) for _ in range(setting.tokens)]
        plain.ask(repeat, prompt)
        before = _stored(filling)
        filling.ask(repeat, prompt)
        deadline_s = time.monotonic() + 60
        while _stored(filling) - before < setting.blocks:
            if time.monotonic() > deadline_s:
                sys.exit("loads: the prompt does not come to the store")
            time.sleep(0.01)
        for way in others:
            way.ask(repeat, prompt)


def _print(ways: list[Way], setting: Setting) -> None:
    plain = statistics.median(ways[0].seconds)
    blocks = setting.blocks
    print(
        f"ms to the first token of {setting.tokens} tokens, {setting.model.name}, {setting.repeats} repeats; "
        f"{blocks * setting.block_bytes / 1e6:.0f} MB in the store as {setting.config.store_codec}"
    )
    print(f"{'':<28}{'first':>8}{'later':>8}{'/ computed':>12}{'best':>8}{'loaded':>8}")
    for way in ways:
        later = statistics.median(way.seconds[1:] or way.seconds)
        best = ""
        if way.bytes_per_s:
            block_s = plain / blocks, setting.block_bytes / way.bytes_per_s
            best_s = min(max(n * block_s[0], (blocks - n) * block_s[1]) for n in range(blocks + 1))
            best = f"{best_s * 1e3:.0f}"
        print(
            f"{way.name:<28}{way.seconds[0] * 1e3:8.1f}{later * 1e3:8.1f}{later / plain:12.2f}{best:>8}"
            f"{way.loaded / setting.tokens:8.0%}"
        )


def _load(options: argparse.Namespace) -> LoadedModel:
    length = options.tokens + 2
    if options.model.suffix == ".gguf" or any(options.model.glob("*.safetensors")):
        return load_model(options.model, device=options.device, max_model_len=length)
    return random_model(
        json.loads((options.model / "config.json").read_text()),
        device=options.device,
        dtype=torch.bfloat16 if options.device == "cuda" else torch.float32,
        name=options.model.name,
        max_model_len=length,
    )


def _stored(way: Way) -> int:
    assert way.store is not None
    return way.store.counts().get("written:stored", 0)


def _start_proxy(server: LocalRedis, bytes_per_s: float) -> tuple[str, BaseProcess]:
    """The URL of a slow way to the server, in a process of its own: this one's interpreter is busy."""
    spawn = get_context("spawn")
    ours, theirs = spawn.Pipe()
    port = int(server.url.split(":")[2].split("/")[0])
    process = spawn.Process(target=_be_slow, args=(port, bytes_per_s, theirs), daemon=True)
    process.start()
    url: str = ours.recv()
    return url, process


def _be_slow(port: int, bytes_per_s: float, parent: Connection) -> None:
    parent.send(SlowProxy(port, bytes_per_s).url)
    Event().wait()  # until it is killed


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0] if __doc__ else "")
    add = parser.add_argument
    add("--model", type=Path, default=DEMO_MODEL, metavar="PATH", help="(default: the demo model)")
    add("--tokens", type=int, default=1500, help="of the prompt (default %(default)s)")
    add("--repeats", type=int, default=3, help="(default %(default)s)")
    add("--device", default="cpu")
    add("--codec", default="none", help="how blocks travel (default %(default)s)")
    add("--mb-per-s", type=float, nargs="*", default=MB_PER_S, metavar="N", help="links to try")
    add("--json", type=Path, metavar="FILE", help="write the figures there too")
    return parser


if __name__ == "__main__":
    sys.exit(main())
