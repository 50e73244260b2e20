"""Which tokens are believed, what they say, and that everything else is refused in one way."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from typing import Any

import jwt
import pytest
from cryptography.hazmat.primitives.asymmetric.ec import SECP384R1, generate_private_key
from cryptography.hazmat.primitives.asymmetric.rsa import generate_private_key as generate_rsa_key
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from hypothesis import given
from hypothesis import strategies as st

from realtime.access.principal import DEFAULT_SCOPES, LEEWAY_S
from realtime.access.tokens import Claims, Verifier, is_configured, make_verifier, sign
from realtime.errors import AuthenticationError
from realtime.settings import Settings, SettingsError
from tests.access.signing import EC, ED, PAIRS, RSA, SECRET, claims, encoded, handmade, handmade_claims, jwk, pem, token

AUDIENCE, ISSUER = "https://realtime.example.org", "https://login.example.org"


def verifier(**settings: Any) -> Verifier:
    """What these settings check tokens with; by default a secret."""
    made = make_verifier(Settings(**(settings or {"auth_secret": SECRET})))
    assert made is not None
    return made


async def refusal(text: str, by: Verifier | None = None) -> str:
    """The code with which a token is refused."""
    with pytest.raises(AuthenticationError) as refused:
        await (by or verifier()).verify(text)
    assert refused.value.message in {"The token is not valid.", "The token has expired."}
    assert refused.value.__cause__ is None
    return refused.value.code


# --- good ones -------------------------------------------------------------------------------------------------------


async def test_a_token_tells_its_user_and_its_times() -> None:
    """What it does not name is everything that a user may do."""
    said = claims()
    assert await verifier().verify(token(**said)) == Claims(
        user="anna", session_id=None, scopes=DEFAULT_SCOPES, issued_at=said["iat"], expires_at=said["exp"]
    )


async def test_a_token_needs_no_time_of_issue() -> None:
    """Then nobody knows it."""
    assert (await verifier().verify(token(iat=None))).issued_at is None


async def test_a_token_may_be_for_one_session() -> None:
    """And for no other."""
    assert (await verifier().verify(token(session_id="sess_1"))).session_id == "sess_1"


@pytest.mark.parametrize(
    ("scope", "scopes"),
    [("session", {"session"}), ("admin  task launch", {"admin", "task"}), ("", set()), ("Session", set())],
)
async def test_a_scope_is_the_words_that_are_known(scope: str, scopes: set[str]) -> None:
    """Others may be for other servers."""
    assert (await verifier().verify(token(scope=scope))).scopes == scopes


@pytest.mark.parametrize("algorithm", PAIRS)
@pytest.mark.parametrize("line_end", ["\n", "\\n"])
async def test_the_kind_of_a_public_key_says_which_tokens_it_checks(algorithm: str, line_end: str) -> None:
    """A variable of one line will do."""
    by = verifier(auth_public_key=pem(PAIRS[algorithm]).replace("\n", line_end))
    assert (await by.verify(token(PAIRS[algorithm], algorithm))).user == "anna"


async def test_an_audience_may_be_one_of_several() -> None:
    """The server's has to be among them."""
    by = verifier(auth_secret=SECRET, auth_audience=AUDIENCE, auth_issuer=ISSUER)
    assert (await by.verify(token(aud=["other", AUDIENCE], iss=ISSUER))).user == "anna"


async def test_where_none_is_asked_for_any_audience_and_issuer_will_do() -> None:
    """Also none."""
    assert (await verifier().verify(token(aud="other", iss=ISSUER))).user == "anna"


async def test_clocks_may_be_a_minute_apart() -> None:
    """A token may be a little from the future."""
    soon = int(time.time()) + 50
    assert (await verifier().verify(token(iat=soon, nbf=soon))).issued_at == soon


# --- bad ones --------------------------------------------------------------------------------------------------------

BAD: dict[str, Callable[[], str]] = {
    "empty": lambda: "",
    "no algorithm": lambda: jwt.encode(claims(), "", "none"),
    "no algorithm, with a signature": lambda: handmade('{"alg":"none"}', json.dumps(claims())),
    "no algorithm, in other letters": lambda: handmade('{"alg":"nOnE"}', json.dumps(claims())),
    "another algorithm of the same secret": lambda: token(SECRET * 2, "HS512"),
    "an algorithm that is a list": lambda: handmade('{"alg":["HS256"]}', json.dumps(claims())),
    "no algorithm named": lambda: handmade("{}", json.dumps(claims())),
    "a key of a pair": lambda: token(RSA, "RS256"),
    "another secret": lambda: token(SECRET[::-1]),
    "not yet valid": lambda: token(nbf=int(time.time()) + 90),
    "issued in the future": lambda: token(iat=int(time.time()) + 90),
    "without user": lambda: token(sub=None),
    "without expiry": lambda: token(exp=None),
    "an empty user": lambda: token(sub=""),
    "a user that is a number": lambda: handmade_claims(sub=7),
    "a user that is null": lambda: handmade_claims(sub=None),
    "a user with a line end": lambda: token(sub="anna\n"),
    "a user with a zero": lambda: token(sub="an\0na"),
    "a user of 257 characters": lambda: token(sub="a" * 257),
    "a user of half a character": lambda: handmade('{"alg":"HS256"}', json.dumps(claims(sub="\ud800"))),
    "an expiry that is text": lambda: handmade_claims(exp=str(claims()["exp"])),
    "an expiry that is true": lambda: handmade_claims(exp=True),
    "an expiry that is null": lambda: handmade_claims(exp=None),
    "an expiry in milliseconds": lambda: token(exp=claims()["exp"] * 1000),
    "an expiry that is no number": lambda: handmade_claims(exp=float("nan")),
    "an expiry that is endless": lambda: handmade_claims(exp=float("inf")),
    "a huge expiry": lambda: handmade_claims(exp=10**400),
    "an expiry below zero": lambda: handmade_claims(exp=-1),
    "an issue that is no number": lambda: handmade_claims(iat=float("nan")),
    "an issue without beginning": lambda: handmade_claims(iat=-float("inf")),
    "an issue long ago": lambda: handmade_claims(iat=-(10**400)),
    "an issue that is a list": lambda: handmade_claims(iat=[1]),
    "a beginning that is text": lambda: handmade_claims(nbf="1"),
    "a session that is a number": lambda: handmade_claims(session_id=1),
    "a session that is null": lambda: handmade_claims(session_id=None),
    "a session that can't be one": lambda: token(session_id="../x"),
    "a scope that is a list": lambda: handmade_claims(scope=["session"]),
    "a scope that is null": lambda: handmade_claims(scope=None),
    "an id that is a number": lambda: handmade_claims(jti=1),
    "a key id that is a number": lambda: handmade('{"alg":"HS256","kid":1}', json.dumps(claims())),
    "something critical": lambda: handmade('{"alg":"HS256","crit":["exp"]}', json.dumps(claims())),
    "detached": lambda: handmade('{"alg":"HS256","b64":false,"crit":["b64"]}', ""),
    "a header that is no object": lambda: handmade("[]", json.dumps(claims())),
    "a header that is deep": lambda: handmade("[" * 3000, json.dumps(claims())),
    "claims that are no object": lambda: handmade('{"alg":"HS256"}', "[1]"),
    "claims that are deep": lambda: handmade('{"alg":"HS256"}', '{"a":' * 1000 + "1" + "}" * 1000),
    "claims that are very deep": lambda: handmade('{"alg":"HS256"}', "[" * 5000),
    "claims that are no JSON": lambda: handmade('{"alg":"HS256"}', "sub=anna"),
    "claims that are no text": lambda: handmade('{"alg":"HS256"}', b"\xff\xfe\xfd"),
    "a number of 5,000 digits": lambda: handmade('{"alg":"HS256"}', '{"exp":' + "1" * 5000 + "}"),
    "truncated by one": lambda: token()[:-1],
    "truncated by a part": lambda: token().rpartition(".")[0],
    "without signature": lambda: token().rpartition(".")[0] + ".",
    "one part more": lambda: token() + ".e30",
    "padded": lambda: token() + "=",
    "in spaces": lambda: f" {token()} ",
    "with a line end": lambda: token() + "\n",
    "nested": lambda: handmade('{"alg":"HS256","cty":"JWT"}', token()),
    "longer than 8 KiB": lambda: token(more="a" * 8192),
    "a mebibyte of junk": lambda: "a" * 2**20,
    "a mebibyte of dots": lambda: "." * 2**20,
    "half characters": lambda: "\ud800.\udfff.\ud800",
    "other letters": lambda: "ä.ö.ü",
    "other digits": lambda: token() + "٣",
}


@pytest.mark.parametrize("name", BAD)
async def test_a_bad_token_is_refused(name: str) -> None:
    """In the same words, whatever is wrong with it."""
    assert await refusal(BAD[name]()) == "invalid_token"


async def test_an_expired_token_says_so() -> None:
    """A new one is all that it takes."""
    assert await refusal(token(exp=int(time.time()) - LEEWAY_S - 1)) == "token_expired"


async def test_a_clock_that_is_a_little_off_does_no_harm() -> None:
    """Nor does an expiry that is over for less than that."""
    assert (await verifier().verify(token(exp=int(time.time()) - LEEWAY_S + 30))).user


@pytest.mark.parametrize("wrong", [{"aud": "other"}, {"sub": ""}, {"nbf": int(time.time()) + 900}, {"scope": 1}])
async def test_an_expired_token_that_is_wrong_beside_does_not(wrong: dict[str, object]) -> None:
    """A new one would not do."""
    by = verifier(auth_secret=SECRET, auth_audience=AUDIENCE)
    expired = claims(exp=int(time.time()) - 90, aud=AUDIENCE) | wrong
    assert await refusal(handmade('{"alg":"HS256"}', json.dumps(expired)), by) == "invalid_token"


@pytest.mark.parametrize(
    "said",
    [
        {},
        {"aud": AUDIENCE},
        {"iss": ISSUER},
        {"aud": "other", "iss": ISSUER},
        {"aud": [], "iss": ISSUER},
        {"aud": [AUDIENCE, 1], "iss": ISSUER},
        {"aud": {AUDIENCE: 1}, "iss": ISSUER},
        {"aud": AUDIENCE, "iss": "other"},
        {"aud": AUDIENCE, "iss": None},
        {"aud": AUDIENCE, "iss": [ISSUER]},
        {"aud": AUDIENCE, "iss": f"{ISSUER}/"},
    ],
)
async def test_a_token_for_others_or_by_others_is_refused(said: dict[str, object]) -> None:
    """Both have to be what is asked for, to the letter."""
    by = verifier(auth_secret=SECRET, auth_audience=AUDIENCE, auth_issuer=ISSUER)
    assert await refusal(handmade_claims(**said), by) == "invalid_token"


@pytest.mark.parametrize("algorithm", PAIRS)
async def test_a_public_key_is_no_secret(algorithm: str) -> None:
    """Everybody knows it: what it has "signed" by HS256 is signed by nobody."""
    public = pem(PAIRS[algorithm])
    by = verifier(auth_public_key=public)
    for secret in (public, public.strip(), jwk(PAIRS[algorithm]).get("x", "AQAB")):
        assert await refusal(handmade('{"alg":"HS256"}', json.dumps(claims()), secret), by) == "invalid_token"


@pytest.mark.parametrize("algorithm", PAIRS)
async def test_a_key_checks_tokens_of_its_own_kind_only(algorithm: str) -> None:
    """Whatever a token claims to be signed with, and whatever its signature is."""
    by = verifier(auth_public_key=pem(PAIRS[algorithm]))
    for other, key in PAIRS.items():
        if other != algorithm:
            assert await refusal(token(key, other), by) == "invalid_token"
    head, said, signature = token(PAIRS[algorithm], algorithm).split(".")
    for name in ("none", "HS256", "RS512", "PS256", "ES384", "ES256", "RS256", "EdDSA"):
        forged = f"{encoded(json.dumps({'alg': name}))}.{said}.{signature}"
        assert await refusal(forged, by) == "invalid_token"
    for cut in (signature[:-4], signature + "AAAA", "AAAA", signature[4:]):
        assert await refusal(f"{head}.{said}.{cut}", by) == "invalid_token"


@given(st.data())
async def test_a_token_that_was_changed_is_refused(data: st.DataObject) -> None:
    """Wherever, and however."""
    good = token()
    start = data.draw(st.integers(0, len(good)))
    end = data.draw(st.integers(start, min(len(good), start + 8)))
    middle = data.draw(st.text(max_size=8) | st.text("abcXYZ019-_.=", max_size=8))
    changed = good[:start] + middle + good[end:]
    if changed != good:
        assert await refusal(changed) == "invalid_token"


@given(
    st.dictionaries(
        st.sampled_from(["sub", "exp", "iat", "nbf", "aud", "iss", "jti", "session_id", "scope"]),
        st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.lists(st.integers()),
    )
)
async def test_no_claims_make_a_check_fail_otherwise(odd: dict[str, object]) -> None:
    """Whoever may sign may write what they like."""
    try:
        said = await verifier().verify(handmade('{"alg":"HS256"}', json.dumps(claims() | odd)))
    except AuthenticationError:
        return
    assert said.user
    assert said.expires_at > time.time()


# --- settings --------------------------------------------------------------------------------------------------------


def test_without_a_key_nothing_is_checked() -> None:
    """An audience alone is no key."""
    assert make_verifier(Settings(auth_audience=AUDIENCE)) is None
    assert not is_configured(Settings(auth_audience=AUDIENCE))
    assert is_configured(Settings(auth_secret=SECRET))


def test_there_is_one_way_to_check() -> None:
    """Two of them would be as weak as the weaker one."""
    with pytest.raises(SettingsError, match="REALTIME_AUTH_SECRET, REALTIME_AUTH_PUBLIC_KEY are set") as refused:
        make_verifier(Settings(auth_secret=SECRET, auth_public_key=pem(EC)))
    assert SECRET not in str(refused.value)


def test_a_fixed_key_needs_no_owner() -> None:
    """A set of keys does."""
    assert not isinstance(verifier(), AbstractAsyncContextManager)
    assert isinstance(verifier(auth_jwks_url="https://localhost/keys"), AbstractAsyncContextManager)


def test_keys_come_over_https_only() -> None:
    """Also where nobody has checked the settings."""
    with pytest.raises(SettingsError, match="REALTIME_AUTH_JWKS_URL"):
        verifier(auth_jwks_url="http://localhost/keys")


PRIVATE = ED.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()).decode()


@pytest.mark.parametrize(
    ("key", "reason"),
    [
        ("canary", "no public key in PEM"),
        (pem(RSA)[:-60], "no public key in PEM"),
        (PRIVATE, "no public key in PEM"),
        ("\udcff", "no public key in PEM"),
        (pem(generate_rsa_key(65537, 1024)), "another kind"),
        (pem(generate_private_key(SECP384R1())), "another kind"),
    ],
)
def test_a_public_key_that_will_not_do_is_refused_in_one_line(key: str, reason: str) -> None:
    """It names the setting, and does not repeat the key."""
    with pytest.raises(SettingsError, match=f"^REALTIME_AUTH_PUBLIC_KEY is not allowed: .*{reason}") as refused:
        verifier(auth_public_key=key)
    said = str(refused.value)
    assert "\n" not in said
    assert key.splitlines()[-1] not in said


def test_a_public_key_given_as_the_secret_is_refused() -> None:
    """Everybody could sign with it."""
    with pytest.raises(SettingsError, match="REALTIME_AUTH_SECRET") as refused:
        verifier(auth_secret=pem(RSA))
    assert "BEGIN" not in str(refused.value)


# --- making them -----------------------------------------------------------------------------------------------------


async def test_what_is_signed_is_believed() -> None:
    """With all that it was given and the settings ask for."""
    settings = Settings(auth_secret=SECRET, auth_audience=AUDIENCE, auth_issuer=ISSUER)
    by = make_verifier(settings)
    assert by is not None
    said = await by.verify(sign(settings, user="anna", session_id="sess_1", ttl_s=60, scopes=["task", "admin"]))
    assert (said.user, said.session_id, sorted(said.scopes)) == ("anna", "sess_1", ["admin", "task"])
    assert said.issued_at is not None
    assert said.expires_at == said.issued_at + 60


async def test_what_is_signed_for_a_time_that_is_over_has_expired() -> None:
    """For tests of what comes then."""
    assert await refusal(sign(Settings(auth_secret=SECRET), user="anna", ttl_s=-LEEWAY_S - 1)) == "token_expired"


async def test_no_scopes_are_none() -> None:
    """Not the default ones."""
    assert (await verifier().verify(sign(Settings(auth_secret=SECRET), user="a", ttl_s=60, scopes=[]))).scopes == set()


@pytest.mark.parametrize("wrong", [{"user": ""}, {"user": "a\n"}, {"session_id": "no id"}, {"ttl_s": 1e15}])
def test_a_token_that_would_be_refused_is_not_made(wrong: dict[str, object]) -> None:
    """Whoever makes it is told."""
    with pytest.raises(SettingsError, match="no token can say that"):
        sign(Settings(auth_secret=SECRET), **{"user": "anna", "ttl_s": 60, **wrong})  # type: ignore[arg-type]


def test_without_a_secret_nothing_is_signed() -> None:
    """Nobody's private key is here."""
    with pytest.raises(SettingsError, match="REALTIME_AUTH_SECRET is not set"):
        sign(Settings(auth_public_key=pem(EC)), user="anna", ttl_s=60)


def test_what_checks_tokens_is_imported_where_there_is_a_key() -> None:
    """It takes tenths of a second."""
    code = (
        "import sys, realtime.cli, realtime.access.tokens as t, realtime.settings as s; t.make_verifier(s.Settings())"
    )
    script = f"{code}; print([name for name in ('jwt', 'cryptography', 'httpx2') if name in sys.modules])"
    assert subprocess.run([sys.executable, "-c", script], capture_output=True, text=True).stdout == "[]\n"
