"""docker-compose.yml and the Dockerfile agree with each other, with nginx's configuration, and with the server."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tomllib

import click
import pytest
from packaging.specifiers import SpecifierSet

from realtime.access.tokens import is_configured
from realtime.cli import main
from realtime.settings import Settings, load_settings, unknown_settings, variable
from realtime.tasks.saq_queue import CANCEL_S
from tests.support.deployment import (
    COMPOSE_FILE,
    INSTANCES,
    ROOT,
    environment_of,
    filled,
    image_environment,
    image_health_check,
    instruction,
    instructions,
    last_stage,
    networks,
    services,
    words,
)
from tests.support.instance import environment as clean
from tests.support.nginx import CONFIGURATION

SERVICES = services()
SERVERS = (*INSTANCES, "worker")
"""What runs the image."""
PASSED_ON = {"ANTHROPIC_API_KEY", "ANTHROPIC_BASE_URL", "OPENAI_API_KEY", "OPENAI_BASE_URL"}
SECRET = "a secret for tokens, of at least 32 bytes"


def environment(name: str) -> dict[str, str]:
    """What an instance finds in its environment."""
    return {**image_environment(), **environment_of(SERVICES[name])}


def seconds(text: str) -> float:
    """A time as the compose file writes it."""
    return float(text.removesuffix("s"))


def client() -> list[str]:
    """The command of Compose, whose `config` needs no engine: the plugin, or the program of its own."""
    for command in (["docker", "compose"], ["docker-compose"]):
        if shutil.which(command[0]) and subprocess.run([*command, "version"], capture_output=True).returncode == 0:
            return command
    if "CI" in os.environ:
        pytest.fail("neither `docker compose` nor docker-compose is here (make test-packages)")
    pytest.skip("neither `docker compose` nor docker-compose is here")


def test_compose_takes_the_file() -> None:
    """Its own client finds nothing wrong, and fills in what the shell says."""
    command = [*client(), "--file", str(COMPOSE_FILE), "config"]
    given = {"ANTHROPIC_API_KEY": "from-the-shell", "REALTIME_AUTH_SECRET": SECRET}
    variables = {**os.environ, "NGINX_PUBLISH": "0.0.0.0:8443", **given}
    result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=variables, check=False)
    assert result.returncode == 0, result.stderr
    assert [result.stdout.count(value) for value in given.values()] == [len(SERVERS)] * len(given)
    assert re.search(r"0\.0\.0\.0:8443:8080|host_ip: 0\.0\.0\.0", result.stdout)


@pytest.mark.parametrize("name", SERVERS)
def test_the_settings_of_an_instance_are_settings(name: str) -> None:
    """Each is known to the server, and has a value that it takes."""
    found = environment(name)
    load_settings(found)
    assert unknown_settings({**found, **dict.fromkeys(SERVICES[name]["environment"], "")}) == []
    others = {variable for variable in SERVICES[name]["environment"] if not variable.startswith("REALTIME_")}
    assert others == PASSED_ON


@pytest.mark.parametrize("name", SERVERS)
def test_who_may_do_what_and_at_what_cost_is_said_by_the_shell(name: str) -> None:
    """Keys, limits, budgets and prices are passed on where they are set, and have no other value here."""
    fields = [field for field in Settings.__struct_fields__ if field.startswith(("auth_", "rate_", "max_"))]
    fields += ["seal_keys", "token_budget", "session_token_budget", "prices"]
    given = SERVICES[name]["environment"]
    assert {field: given.get(variable(field), "missing") for field in fields} == dict.fromkeys(fields)


@pytest.mark.parametrize("name", INSTANCES)
def test_a_secret_that_the_shell_has_counts(name: str) -> None:
    """Without one nobody is asked for a token; with one everybody is, for all that the command says."""
    assert not is_configured(load_settings(environment(name)))
    assert is_configured(load_settings({**environment(name), "REALTIME_AUTH_SECRET": SECRET}))


@pytest.mark.parametrize("name", INSTANCES)
def test_the_command_of_an_instance_is_one_of_the_server(name: str) -> None:
    """The command line takes it, and with it the address that the image sets."""
    assert words("ENTRYPOINT") == ["realtime"]
    assert words("CMD") == ["serve"]
    command, *options = SERVICES[name]["command"]
    parsed = main.commands[command].make_context(command, list(options), parent=click.Context(main))
    assert parsed.params["insecure_no_auth"] is True
    assert load_settings(environment(name)).host == "0.0.0.0"


def test_the_worker_is_one_of_the_instances_with_another_command() -> None:
    """The same image and settings: it knows the same tasks, the same model and the same Redis."""
    worker, instance = SERVICES["worker"], SERVICES[INSTANCES[0]]
    changed = {name for name in worker if worker[name] != instance.get(name)}
    assert changed == {"command", "healthcheck", "stop_grace_period"}
    [command] = worker["command"]
    main.commands[command].make_context(command, [], parent=click.Context(main))


def test_the_worker_is_not_asked_for_its_health() -> None:
    """The image's check asks a port, and it listens on none; so nobody waits for it to be well."""
    assert SERVICES["worker"]["healthcheck"] == {"disable": True}
    assert not [name for name, service in SERVICES.items() if "worker" in service.get("depends_on", {})]


def test_instances_are_alike() -> None:
    """nginx may send anybody to any of them."""
    one, two = (SERVICES[name] for name in INSTANCES)
    assert one == two


def test_sessions_are_shared() -> None:
    """All have the same Redis, by its name and port."""
    for name in SERVERS:
        assert load_settings(environment(name)).redis_url == "redis://redis:6379/0"
        assert set(SERVICES[name]["networks"]) & set(SERVICES["redis"]["networks"]) == {"store"}


def test_nginx_is_given_the_configuration_that_is_tested() -> None:
    """The file is mounted where nginx looks for it, and only to be read."""
    source, target, mode = SERVICES["nginx"]["volumes"][0].split(":")
    assert (ROOT / source).resolve() == CONFIGURATION
    assert (target, mode) == ("/etc/nginx/nginx.conf", "ro")


def test_nginx_knows_the_instances_by_their_names() -> None:
    """Each upstream lists all of them, on the port that they listen on, and nothing else."""
    port = load_settings(environment(INSTANCES[0])).port
    upstreams = re.findall(r"upstream \w+ \{(.*?)\n    \}", CONFIGURATION.read_text(), re.DOTALL)
    assert len(upstreams) == 2
    for upstream in upstreams:
        assert re.findall(r"server (\S+) ", upstream) == [f"{name}:{port}" for name in INSTANCES]
    assert all(set(SERVICES[name]["networks"]) & set(SERVICES["nginx"]["networks"]) for name in INSTANCES)


@pytest.mark.parametrize("name", INSTANCES)
def test_an_instance_believes_nginx_and_nobody_who_is_not_on_their_network(name: str) -> None:
    """Its trusted proxies are the addresses of that network, which nobody but nginx and those like itself is on."""
    [configured] = networks()["front"]["ipam"]["config"]
    assert load_settings(environment(name)).trusted_proxies == (filled(configured["subnet"]),)
    assert {other for other, service in SERVICES.items() if "front" in service["networks"]} == {"nginx", *SERVERS}


def test_only_nginx_is_published_and_only_to_this_machine() -> None:
    """Without a key for tokens who reaches the port may spend the model's tokens."""
    published = {name: service["ports"] for name, service in SERVICES.items() if "ports" in service}
    assert set(published) == {"nginx"}
    (port,) = published["nginx"]
    address, _, inside = filled(port).rpartition(":")
    assert address.startswith("127.0.0.1:")
    assert f"listen {inside} " in CONFIGURATION.read_text()


def test_redis_is_out_of_reach_of_nginx_and_of_the_world() -> None:
    """It has no password, so its network leads nowhere."""
    assert SERVICES["redis"]["networks"] == ["store"]
    assert "store" not in SERVICES["nginx"]["networks"]
    assert "internal: true" in COMPOSE_FILE.read_text()


@pytest.mark.parametrize("name", SERVICES)
def test_a_service_may_do_no_more_than_it_needs(name: str) -> None:
    """No root, no capability, no file system to write to; it comes back after a crash, and its log has an end."""
    service = SERVICES[name]
    user = service.get("user") or instruction("USER")
    assert re.fullmatch(r"[1-9]\d*:[1-9]\d*", user)
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert "cap_add" not in service
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert service["restart"] == "unless-stopped"
    assert service["logging"]["options"]["max-size"]


@pytest.mark.parametrize("name", SERVICES)
def test_who_depends_on_a_service_waits_until_it_is_well(name: str) -> None:
    """And each that is waited for says whether it is."""
    for other, how in SERVICES[name].get("depends_on", {}).items():
        assert how == {"condition": "service_healthy"}
        assert "healthcheck" in SERVICES[other] or "build" in SERVICES[other]


def test_an_instance_has_the_time_to_drain() -> None:
    """Longer than the server says it needs, the worker longer by what its tasks may take to stop; nginx longer than its
    workers are given."""
    for name in INSTANCES:
        assert seconds(SERVICES[name]["stop_grace_period"]) >= load_settings(environment(name)).drain_s + 5
    drain_s = load_settings(environment("worker")).drain_s
    assert seconds(SERVICES["worker"]["stop_grace_period"]) >= drain_s + CANCEL_S + 5
    (shutdown,) = re.findall(r"^worker_shutdown_timeout (\d+)s;", CONFIGURATION.read_text(), re.MULTILINE)
    assert seconds(SERVICES["nginx"]["stop_grace_period"]) > float(shutdown)


def test_descriptors_are_enough() -> None:
    """For all connections and model calls of an instance, and for what nginx asks for."""
    settings = load_settings(environment(INSTANCES[0]))
    limit = SERVICES[INSTANCES[0]]["ulimits"]["nofile"]
    assert limit > settings.max_connections + settings.upstream_max_connections
    (asked,) = re.findall(r"^worker_rlimit_nofile (\d+);", CONFIGURATION.read_text(), re.MULTILINE)
    assert SERVICES["nginx"]["ulimits"]["nofile"] >= int(asked)


@pytest.mark.parametrize("name", ["nginx", "redis"])
def test_images_are_named_without_a_registry_and_with_a_version(name: str) -> None:
    """Where they come from is the engine's affair."""
    assert re.fullmatch(r"[a-z]+:\d+\.\d+-alpine", SERVICES[name]["image"])


# --------------------------------------------------------------------------------------------------- the Dockerfile


def test_what_the_dockerfile_copies_is_there_and_not_ignored() -> None:
    """Nothing else gets in: everything is ignored but what is named."""
    ignored, *kept = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if not line.startswith("#")]
    assert ignored == "*"
    sources = {source for word, rest in instructions() if word == "COPY" for source in rest.split()[:-1]}
    sources = {source for source in sources if source != "--from=build" and not source.startswith("/opt/")}
    assert sources == {line.removeprefix("!") for line in kept if line.startswith("!")}
    assert [source for source in sources if not (ROOT / source).exists()] == []


def test_the_dockerfile_copies_what_the_package_is_built_from() -> None:
    """The files that the build names."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    wheel = project["tool"]["hatch"]["build"]["targets"]["wheel"]
    needed = {
        "pyproject.toml",
        project["project"]["readme"],
        *project["project"]["license-files"],
        *wheel["only-include"],
    }
    copied = {source for word, rest in instructions() if word == "COPY" for source in rest.split()[:-1]}
    assert needed <= copied


def test_both_stages_have_a_python_that_the_package_allows() -> None:
    """The environment is made in the one and used in the other."""
    images = {rest.partition(" ")[0] for word, rest in instructions() if word == "FROM"}
    (image,) = images
    version = re.fullmatch(r"python:(\d+\.\d+)-slim", image)
    assert version is not None
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert SpecifierSet(project["project"]["requires-python"]).contains(version[1])


def test_signals_reach_the_server() -> None:
    """No shell stands between, and the one that is sent is the one that it drains on."""
    assert instruction("STOPSIGNAL") == "SIGTERM"
    assert not [rest for word, rest in last_stage() if word in {"ENTRYPOINT", "CMD"} and not rest.startswith("[")]


def test_the_image_sets_known_settings() -> None:
    """And is not to be reached without a word: who starts it gives it a key, or says that none is meant."""
    found = image_environment()
    assert unknown_settings(found) == []
    assert load_settings(found).host == "0.0.0.0"
    assert instruction("EXPOSE") == str(load_settings(found).port)
    command = [sys.executable, "-m", "realtime", *words("CMD")]
    result = subprocess.run(
        command, capture_output=True, text=True, cwd=ROOT, env=clean(found), timeout=30, check=False
    )
    assert result.returncode == 1
    assert "--insecure-no-auth" in result.stderr


def test_the_health_check_needs_nothing_that_the_image_lacks() -> None:
    """Its program is the image's Python."""
    program, flag, _ = image_health_check()
    assert (program, flag) == ("python", "-c")
