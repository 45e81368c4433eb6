"""Configuration: precedence, conversions, and messages that name option, value and what is allowed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from expertd_engine.config import Config, Size, config_from_json, config_to_json, option_names, parse_size
from expertd_engine.config_sources import load_config
from expertd_engine.errors import ConfigError


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("4096", 4096),
        ("1b", 1),
        ("2GB", 2 * 10**9),
        ("512MiB", 512 * 2**20),
        (" 1.5 kib ", 1536),
        ("3tib", 3 * 2**40),
    ],
)
def test_a_size_in_bytes(text: str, expected: int) -> None:
    assert parse_size(text) == Size(bytes=expected)


@pytest.mark.parametrize("text", ["", "-1", "0", "0.2", "1e9", "12 apples", "MiB", "25%", "1 2", "1_000", "nan"])
def test_what_is_no_size_is_refused_by_its_text(text: str) -> None:
    with pytest.raises(ConfigError, match="is not a size: allowed are bytes") as raised:
        parse_size(text)
    assert repr(text) in str(raised.value)


def test_a_share_counts_against_the_total_and_only_where_allowed() -> None:
    assert parse_size("25%", share_allowed=True).resolve(1000) == 250
    assert parse_size("100%", share_allowed=True).resolve(12345) == 12345
    for text in ("0%", "100.1%"):
        with pytest.raises(ConfigError, match="a share such as 25%, of at most 100%"):
            parse_size(text, share_allowed=True)


@pytest.mark.parametrize("size", [Size(bytes=123), Size(bytes=3 * 2**29), Size(share=0.25), Size(share=0.005)])
def test_a_size_reads_back_what_it_prints(size: Size) -> None:
    assert parse_size(str(size), share_allowed=True) == size


def test_a_size_is_shown_in_the_largest_unit_that_is_exact() -> None:
    assert [str(Size(bytes=n)) for n in (0, 1000, 2**20, 3 * 2**29, 2**30 + 1)] == [
        "0", "1000", "1MiB", "1536MiB", "1073741825",
    ]  # fmt: skip


def test_flags_win_over_environment_over_file_over_default(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("port: 1\nhost: file\nio_threads: 3\n")
    loaded = load_config({"port": "3", "threads": None}, {"EXPERTD_PORT": "2", "EXPERTD_HOST": "variable"}, file)
    config = loaded.config
    assert (config.port, config.host, config.io_threads, config.max_sequences) == (3, "variable", 3, 32)
    assert {name: loaded.sources[name] for name in ("port", "host", "io_threads", "threads")} == {
        "port": "flag",
        "host": "environment",
        "io_threads": str(file),
        "threads": "default",
    }
    assert list(loaded.sources) == option_names()


def test_variables_of_others_and_the_files_own_are_left_alone() -> None:
    assert load_config({}, {"PORT": "x", "EXPERTD_CONFIG": "c.yaml"}).config == Config()


def test_yaml_types_are_taken_as_they_are(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("prefetch: off\nmax_body: 1024\nexpert_budget: 25%\ndrain_timeout_s: 2\nthreads: null\n")
    config = load_config({}, {}, file).config
    assert config.prefetch is False
    assert config.max_body == Size(bytes=1024)
    assert config.expert_budget == Size(share=0.25)
    assert (config.drain_timeout_s, config.threads) == (2.0, None)


def test_all_bodies_together_need_room_for_one() -> None:
    assert load_config({"max_body": "1KiB", "max_bodies": "1KiB"}, {}).config.max_bodies == Size(bytes=1024)
    with pytest.raises(ConfigError, match=r"^max_bodies: 1023 is not allowed: give at least max_body, 1KiB$"):
        load_config({"max_body": "1KiB", "max_bodies": "1023"}, {})


@pytest.mark.parametrize(("name", "value"), [("host_budget", "1GiB"), ("device_misses", "both")])
def test_what_is_for_a_card_alone_does_not_go_with_a_processor(name: str, value: str) -> None:
    with pytest.raises(ConfigError, match=f"^{name}: not with device: cpu"):
        load_config({"device": "cpu", name: value}, {})
    assert load_config({name: value}, {}).sources[name] == "flag", "there may be a card"


def test_an_empty_file_sets_nothing(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("# nothing\n")
    assert load_config({}, {}, file).config == Config()


def test_a_home_folder_is_expanded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/ada")
    assert load_config({"cache_dir": "~/models"}, {}).config.cache_dir == Path("/home/ada/models")


@pytest.mark.parametrize(
    ("name", "text", "allowed"),
    [
        ("port", "65536", "an integer ≥ 0 and ≤ 65535"),
        ("port", "1.5", "an integer"),
        ("max_sequences", "0", "≥ 1"),
        ("drain_timeout_s", "nan", "a number ≥ 0"),
        ("expert_policy", "fifo", "auto, lru, lfu, next-use"),
        ("prefetch", "maybe", "on or off"),
        ("memory_budget", "25%", "bytes, or a number with a unit"),
        ("expert_budget", "lots", "a share such as 25%"),
        ("host", "", "text"),
    ],
)
def test_a_bad_value_is_refused_naming_option_value_and_what_is_allowed(name: str, text: str, allowed: str) -> None:
    with pytest.raises(ConfigError) as raised:
        load_config({name: text}, {})
    message = str(raised.value)
    assert message.startswith(f"{name}: ") and repr(text) in message and allowed in message


@pytest.mark.parametrize(
    "line", ["port: true", "port: [1]", "host: {a: 1}", "memory_budget: true", "memory_budget: 1.5"]
)
def test_a_yaml_value_of_another_type_is_refused(tmp_path: Path, line: str) -> None:
    file = tmp_path / "c.yaml"
    file.write_text(line)
    with pytest.raises(ConfigError, match=f"^{line.partition(':')[0]}: "):
        load_config({}, {}, file)


@pytest.mark.parametrize(
    ("flags", "environment", "named"),
    [({"prot": "1"}, {}, "'prot' in flag"), ({}, {"EXPERTD_PROT": "1"}, "'EXPERTD_PROT' in environment")],
)
def test_an_unknown_option_is_refused(flags: dict[str, str], environment: dict[str, str], named: str) -> None:
    with pytest.raises(ConfigError, match=rf"unknown option {named} \(meant: port\?\): known are .*port"):
        load_config(flags, environment)


@pytest.mark.parametrize(
    ("content", "fault"), [(b"- 1\n", "not a list"), (b"a: [\n", "not valid YAML"), (b"\xff\xfe\xfa", "not valid YAML")]
)
def test_a_broken_file_is_refused_by_name_in_one_line(tmp_path: Path, content: bytes, fault: str) -> None:
    file = tmp_path / "c.yaml"
    file.write_bytes(content)
    with pytest.raises(ConfigError, match=fault) as raised:
        load_config({}, {}, file)
    assert str(file) in str(raised.value) and "\n" not in str(raised.value)


def test_a_missing_file_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"cannot read .*absent\.yaml: No such file"):
        load_config({}, {}, tmp_path / "absent.yaml")


@pytest.mark.parametrize(
    "options", [{}, {"expert_budget": Size(share=0.25), "cache_dir": Path("/x y"), "threads": 3, "prefetch": False}]
)
def test_the_engine_reads_back_what_the_server_hands_over(options: dict[str, Any]) -> None:
    config = Config(**options)
    assert config_from_json(config_to_json(config)) == config
    assert "\n" not in config_to_json(config)


@pytest.mark.parametrize("text", ["{", "[]", '{"port": "x"}'])
def test_json_that_is_no_configuration_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="not a configuration in JSON"):
        config_from_json(text)
