"""Settings come from the environment, and what is wrong is said in one line."""

from __future__ import annotations

import msgspec
import pytest

from realtime.settings import Settings, SettingsError, load_settings, unknown_settings, variable


def refused(name: str, value: str) -> str:
    """The line that refuses a variable."""
    with pytest.raises(SettingsError) as refusal:
        load_settings({name: value})
    line = str(refusal.value)
    assert "\n" not in line
    return line


def test_an_empty_environment_means_the_defaults() -> None:
    """Nothing has to be set."""
    assert load_settings({}) == Settings()


def test_every_setting_has_a_variable() -> None:
    """The field's name in capitals, behind the prefix."""
    assert variable("session_ttl_s") == "REALTIME_SESSION_TTL_S"
    names = [variable(field) for field in Settings.__struct_fields__]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize("field", Settings.__struct_fields__)
def test_every_default_may_be_set(field: str) -> None:
    """Each default, written as text, is read back as it was."""
    default = getattr(Settings(), field)
    text = ",".join(default) if isinstance(default, tuple) else str(default)
    assert getattr(load_settings({variable(field): text}), field) == default


@pytest.mark.parametrize(
    ("field", "text", "value"),
    [
        ("port", "0", 0),
        ("port", " 65535 ", 65535),
        ("session_ttl_s", "0.5", 0.5),
        ("session_ttl_s", "60", 60.0),
        ("log_level", "debug", "debug"),
        ("model", "m", "m"),
        ("allowed_models", "a, b,,c ", ("a", "b", "c")),
        ("allowed_models", "*", ("*",)),
    ],
)
def test_texts_become_values(field: str, text: str, value: object) -> None:
    """Numbers, choices, lists; spaces around them do not count."""
    assert getattr(load_settings({variable(field): text}), field) == value


@pytest.mark.parametrize("blank", ["", "  "])
def test_a_blank_variable_is_not_set(blank: str) -> None:
    """As `docker compose` passes variables that nobody set."""
    assert load_settings({"REALTIME_PORT": blank}) == Settings()


def test_overrides_count_before_the_environment() -> None:
    """What the command line says."""
    assert load_settings({"REALTIME_PORT": "1"}, port=2).port == 2


def test_an_override_is_held_to_the_same_rules() -> None:
    """And told by the same name."""
    with pytest.raises(SettingsError, match="REALTIME_PORT=70000 "):
        load_settings({}, port=70000)


@pytest.mark.parametrize(
    ("name", "value", "allowed"),
    [
        ("REALTIME_PORT", "70000", "<= 65535"),
        ("REALTIME_PORT", "-1", ">= 0"),
        ("REALTIME_PORT", "http", "int"),
        ("REALTIME_ROOT_PATH", "ai", "expected for example /ai"),
        ("REALTIME_ROOT_PATH", "/ai/", "without a slash at its end"),
        ("REALTIME_MAX_CONNECTIONS", "0", ">= 1"),
        ("REALTIME_MAX_CONNECTIONS", "1.5", "int"),
        ("REALTIME_DISCONNECT_GRACE_MS", "-1", ">= 0"),
        ("REALTIME_SESSION_TTL_S", "0", "> 0"),
        ("REALTIME_SESSION_TTL_S", "-5", "> 0"),
        ("REALTIME_SESSION_TTL_S", "nan", "> 0"),
        ("REALTIME_SESSION_TTL_S", "soon", "float"),
    ],
)
def test_a_wrong_setting_is_named_with_what_is_allowed(name: str, value: str, allowed: str) -> None:
    """The setting, its value, what is allowed."""
    line = refused(name, value)
    assert line.startswith(f"{name}={value!r} ")
    assert allowed in line


@pytest.mark.parametrize("field", ["responder", "truncation", "thinking", "on_disconnect", "log_format", "log_level"])
def test_a_wrong_choice_is_told_the_choices(field: str) -> None:
    """Each of them by name."""
    line = refused(variable(field), "wrong")
    [hint] = [found.type for found in msgspec.inspect.type_info(Settings).fields if found.name == field]  # type: ignore[attr-defined]
    assert all(choice in line for choice in hint.values)


@pytest.mark.parametrize("value", ["inf", "1e9"])
def test_a_time_without_end_is_refused(value: str) -> None:
    """Clocks can't add it up; the line says where the limit is."""
    _, allowed = refused("REALTIME_SESSION_TTL_S", value).split(" is not allowed: ")
    assert any(limit in allowed for limit in ("1e9", "1e+09", "1000000000", "1_000_000_000"))


def test_a_value_with_a_line_break_is_told_in_one_line() -> None:
    """Whatever was set."""
    assert "a\\nb" in refused("REALTIME_LOG_LEVEL", "a\nb")


@pytest.mark.parametrize("name", ["REALTIME_AUTH_SECRET", "REALTIME_REDIS_URL", "REALTIME_QUEUE_REDIS_URL"])
def test_a_secret_that_is_refused_is_not_repeated(name: str) -> None:
    """The line names the setting, and shows no value that may hold a secret."""
    line = refused(name, "s3cret")
    assert name in line
    assert "s3cret" not in line


def test_unknown_settings_are_listed() -> None:
    """Typing errors, in order; other programs' variables are none of ours."""
    environ = {"REALTIME_PORTS": "1", "REALTIME_PORT": "1", "PATH": "", "REALTIME_A": ""}
    assert unknown_settings(environ) == ["REALTIME_A", "REALTIME_PORTS"]


def test_settings_do_not_change() -> None:
    """They are read once."""
    with pytest.raises(AttributeError):
        Settings().port = 1  # type: ignore[misc]
