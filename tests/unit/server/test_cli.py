"""The command line: effective values with their source, one line for every error, the right exit code."""

from __future__ import annotations

import dataclasses
import logging
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from expertd_engine.config import Config
from expertd_server.cli import main
from expertd_server.daemon import bind


@pytest.fixture(autouse=True)
def _logging_as_before() -> Iterator[None]:
    """What `serve` logs to is this test's standard error, which nobody may write to once it has ended."""
    root = logging.getLogger()
    level = root.level
    yield
    root.setLevel(level)
    for handler in [one for one in root.handlers if type(one) is logging.StreamHandler]:
        root.removeHandler(handler)


@pytest.fixture(autouse=True)
def _no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("EXPERTD_CONFIG", "EXPERTD_PORT"):
        monkeypatch.delenv(name, raising=False)


def effective(capsys: pytest.CaptureFixture[str]) -> dict[str, tuple[str, str]]:
    lines = [line.partition("#") for line in capsys.readouterr().out.splitlines()]
    return {key.partition(":")[0]: (key.partition(":")[2].strip(), source.strip()) for key, _, source in lines}


def test_every_option_is_shown_with_its_source(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("io_threads: 3\nport: 1\nthreads: 7\n")
    monkeypatch.setenv("EXPERTD_PORT", "2")
    monkeypatch.setenv("EXPERTD_THREADS", "5")
    assert main(["check-config", "m", "--config", str(file), "--threads", "4", "--no-prefetch"]) == 0
    shown = effective(capsys)
    assert shown.keys() == {option.name for option in dataclasses.fields(Config)}
    assert shown["io_threads"] == ("3", str(file))
    assert shown["port"] == ("2", "environment")
    assert shown["threads"] == ("4", "flag")
    assert shown["prefetch"] == ("off", "flag")
    assert shown["model"] == ("m", "flag")
    assert shown["expert_budget"] == ("null", "default")


def test_the_file_may_be_named_by_the_environment(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("max_waiting: 9")
    monkeypatch.setenv("EXPERTD_CONFIG", str(file))
    assert main(["check-config"]) == 0
    assert effective(capsys)["max_waiting"] == ("9", str(file))


@pytest.mark.parametrize(
    ("argv", "code", "named"),
    [
        ([], 2, "COMMAND"),
        (["fly"], 2, "fly"),
        (["serve", "--bogus"], 2, "--bogus"),
        (["check-config", "--port", "99999"], 3, "99999"),
        (["check-config", "--expert-budget", "lots"], 3, "lots"),
        (["check-config", "--config", "/nowhere.yaml"], 3, "/nowhere.yaml"),
    ],
)
def test_an_error_is_one_line_with_its_code(
    capsys: pytest.CaptureFixture[str], argv: list[str], code: int, named: str
) -> None:
    assert main(argv) == code
    error = capsys.readouterr().err
    assert error.startswith("expertd: error: ")
    assert error.count("\n") == 1
    assert named in error


def test_a_taken_port_is_a_resource_error(capsys: pytest.CaptureFixture[str]) -> None:
    with bind("127.0.0.1", 0) as taken:
        port = taken.getsockname()[1]
        assert main(["serve", "demo", "--port", str(port)]) == 4
    error = capsys.readouterr().err
    assert error == (
        f"expertd: error: cannot listen on 127.0.0.1:{port}: Address already in use; end who listens there, "
        "or give another --port\n"
    )


def test_a_reader_that_has_seen_enough_is_no_error() -> None:
    program = "import sys; from expertd_server.cli import main; sys.exit(main(['check-config']))"
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run([sys.executable, "-c", program], stdout=write, stderr=subprocess.PIPE, check=False)
    os.close(write)
    assert (done.returncode, done.stderr) == (128 + signal.SIGPIPE, b"")


def test_an_unknown_option_points_to_its_own_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", "--expert-budge", "25%"]) == 2  # nor is it taken for what it begins like
    assert capsys.readouterr().err.endswith("--expert-budge (see `expertd serve --help`)\n")


def test_the_version_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["--version"])
    assert ended.value.code == 0
    assert capsys.readouterr().out.startswith("expertd ")


def test_keys_are_never_shown(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    file = tmp_path / "keys"
    file.write_text("sesame\n")
    monkeypatch.setenv("EXPERTD_API_KEY", "abracadabra")
    assert main(["check-config", "--api-key-file", str(file)]) == 0
    shown = capsys.readouterr().out
    assert str(file) in shown
    assert "sesame" not in shown and "abracadabra" not in shown


def test_a_key_file_that_cannot_be_read_ends_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", "m", "--port", "0", "--api-key-file", "/nowhere/keys"]) == 3
    assert "cannot read the key file /nowhere/keys" in capsys.readouterr().err
