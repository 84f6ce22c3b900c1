"""What `make run` refuses, each with one line, and that it leaves nothing behind."""

from __future__ import annotations

import shutil
import signal
import socket
from pathlib import Path

import pytest

from tests.launch.started import DEMO_MODEL, Started, free_port


def refusal(*arguments: str, environment: dict[str, str] | None = None) -> str:
    """The one line that it ends with."""
    with Started(*arguments, environment=environment) as started:
        code, errors = started.end()
        assert code == 1
    (line,) = errors.splitlines()
    return line


def test_a_model_that_is_not_there_is_named(tmp_path: Path) -> None:
    line = refusal("--model", str(tmp_path / "none.gguf"))
    assert line == f"reprise: MODEL={tmp_path}/none.gguf does not exist; `make model` fetches the demo model"


def test_a_file_that_is_no_model_is_named(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_text("not found")
    assert refusal("--model", str(tmp_path / "model.gguf")).endswith("nor a Hugging Face folder")


def test_a_folder_that_is_no_model_is_named(tmp_path: Path) -> None:
    assert "without config.json" in refusal("--model", str(tmp_path))


def test_a_taken_port_is_named(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        line = refusal("--model", str(DEMO_MODEL), "--port", str(port))
    assert line.startswith(f"reprise: port {port} on 127.0.0.1 cannot be had: Address already in use")


def test_a_redis_that_does_not_answer_is_named_without_its_password() -> None:
    url = f"redis://user:secret@127.0.0.1:{free_port()}/0"
    line = refusal("--model", str(DEMO_MODEL), "--port", str(free_port()), environment={"REDIS_URL": url})
    assert line.startswith("reprise: no Redis at redis://127.0.0.1:")
    assert "secret" not in line


@pytest.mark.parametrize("workers", ["0", "many", "65"])
def test_a_number_of_workers_that_makes_no_sense_is_refused(workers: str) -> None:
    with Started("--model", str(DEMO_MODEL), "--workers", workers) as started:
        code, errors = started.end()
    assert code == 2
    (line,) = errors.splitlines()
    assert line.endswith(f"argument --workers: must be from 1 to 64, got '{workers}'")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "when"), [(signal.SIGINT, "gcs_server"), (signal.SIGTERM, "ray::ServeReplica")]
)
def test_a_signal_in_the_middle_of_starting_stops_everything(number: signal.Signals, when: str) -> None:
    with Started("--model", str(DEMO_MODEL), "--port", str(free_port())) as started:
        started.part(when)
        started.part("-server 127.0.0.1:")  # Redis, or Valkey
        assert started.stop(number) == (0, "")
        assert started.left() == []


def test_a_part_that_dies_is_named_and_takes_the_others_with_it() -> None:
    with Started("--model", str(DEMO_MODEL), "--port", str(free_port())) as started:
        started.lines_to("starting Ray and the cache store")
        started.part("services.cache_store").kill()
        code, errors = started.end()
        assert code == 1
        assert errors.startswith("reprise: cache store stopped (signal SIGKILL)\n")
        assert started.left() == []
    logs = Path(errors.splitlines()[-1].removeprefix("logs: "))
    assert (logs / "cache-store.log").exists()
    shutil.rmtree(logs)
