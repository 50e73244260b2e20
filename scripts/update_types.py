"""Write the types of the JavaScript client anew: its messages out of the protocol's structs, the rest out of its JSDoc.

    .venv/bin/python scripts/update_types.py [FOLDER]

FOLDER is static/ unless it is given. The compiler is that of tests/node, which `npm ci` there installs. Exits with
what the compiler says where the scripts don't agree with their types.
"""

import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from inspect import getsource
from pathlib import Path

import msgspec
from msgspec import NODEFAULT, inspect

from realtime import protocol

ROOT = Path(__file__).resolve().parent.parent
STATIC = ROOT / "static"
COMPILER = ROOT / "tests/node/node_modules/.bin/tsc"
MESSAGES = "realtime/messages.d.ts"
OPTIONS = "--allowJs --checkJs --strict --declaration --emitDeclarationOnly --stripInternal --target es2022"
HEAD = "// Written by scripts/update_types.py out of the protocol's structs. Kinds that are not here may come, too.\n"
ALWAYS_SENT = {"seq", "fatal"}
SIMPLE = {
    inspect.StrType: "string",
    inspect.IntType: "number",
    inspect.FloatType: "number",
    inspect.BoolType: "boolean",
    inspect.NoneType: "null",
    inspect.AnyType: "any",
}


def main() -> None:
    """Compile a copy without types: where a script has types beside it, those would be believed."""
    target = Path(sys.argv[1]) if len(sys.argv) > 1 else STATIC
    with tempfile.TemporaryDirectory() as name:
        sources, types = Path(name, "sources"), Path(name, "types")
        (sources / "realtime").mkdir(parents=True)
        for script in [Path("realtime.js"), *(file.relative_to(STATIC) for file in STATIC.glob("realtime/*.js"))]:
            shutil.copy(STATIC / script, sources / script)
        (sources / MESSAGES).write_text(messages())
        command = [str(COMPILER), *OPTIONS.split(), "--module", "nodenext", "--outDir", str(types)]
        (sources / "package.json").write_text('{"type": "module"}')
        compiled = subprocess.run([*command, str(sources / "realtime.js")], check=False)
        if compiled.returncode:
            sys.exit(compiled.returncode)
        shutil.copy(sources / MESSAGES, types / MESSAGES)
        for file in needed(types, Path("realtime.d.ts")):
            (target / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(types / file, target / file)


def needed(folder: Path, start: Path) -> set[Path]:
    """The files of types that a file needs, itself among them: not those of what is inside the client alone."""
    found: set[Path] = set()
    waiting = [start]
    while waiting:
        file = waiting.pop()
        found.add(file)
        text = (folder / file).read_text()
        imported = re.findall(r"""["'](\.\.?/[\w./]+)\.js["']""", text)
        paths = {(folder / file.parent / f"{name}.d.ts").resolve().relative_to(folder.resolve()) for name in imported}
        waiting += paths - found
    return found


def messages() -> str:
    """The types of all messages, and of what is in them."""
    server = list(leaves(protocol.ServerMessage))
    client: list[type[msgspec.Struct]] = [*leaves(protocol.ClientMessage), protocol.ResponseCreate]
    objects = [kind for kind in structs() if kind not in {*server, *client} and is_shown(kind)]
    parts = [*map(interface, [*objects, *client, *server])]
    parts += [union("ClientMessage", client), union("ServerEvent", server)]
    parts += [union("ResponseEvent", of(server, "Response")), union("TaskEvent", of(server, "Task"))]
    return HEAD + "\n" + "\n".join(parts)


def structs() -> Iterator[type[msgspec.Struct]]:
    """Every struct of the protocol, in its order."""
    for value in vars(protocol).values():
        if isinstance(value, type) and issubclass(value, msgspec.Struct) and value.__module__ == protocol.__name__:
            yield value


def is_shown(kind: type[msgspec.Struct]) -> bool:
    """Whether it is an object inside messages: not a message, nor what only the server has."""
    return not issubclass(kind, protocol.ServerMessage | protocol.ClientMessage | protocol.Codec | protocol.Bill)


def leaves(base: type[msgspec.Struct]) -> Iterator[type[msgspec.Struct]]:
    """The protocol's messages that are derived from a base."""
    for kind in base.__subclasses__():
        yield from leaves(kind)
    if not base.__subclasses__() and base.__module__ == protocol.__name__:
        yield base


def of(kinds: list[type[msgspec.Struct]], word: str) -> list[type[msgspec.Struct]]:
    """The events of a response's or a task's life."""
    channel = f"{word.lower()}_id"
    return [kind for kind in kinds if kind.__name__ == f"{word}Created" or channel in kind.__struct_fields__]


def union(name: str, kinds: list[type[msgspec.Struct]]) -> str:
    """A name for any of some kinds."""
    return f"export type {name} =" + "".join(f"\n  | {kind.__name__}" for kind in kinds) + ";\n"


def interface(kind: type[msgspec.Struct]) -> str:
    """A struct as an interface, its docstring as the comment."""
    info = inspect.type_info(kind)
    assert isinstance(info, inspect.StructType)
    tag = [f'  type: "{info.tag}";'] if info.tag else []
    shown = [field for field in info.fields if field.name not in in_the_log_only(kind)]
    lines = [f"/** {' '.join((kind.__doc__ or '').split())} */", f"export interface {kind.__name__} {{"]
    return "\n".join([*lines, *tag, *map(member, shown), "}"]) + "\n"


def in_the_log_only(kind: type[msgspec.Struct]) -> set[str]:
    """The fields that `for_clients` takes out of an event."""
    if not issubclass(kind, protocol.ChannelEvent):
        return set()
    return set(re.findall(r"(\w+)=None", getsource(kind.for_clients)))


def member(field: inspect.Field) -> str:
    """A field; one that has a default may be absent."""
    has_default = field.default is not NODEFAULT or field.default_factory is not NODEFAULT
    absent = has_default and field.name not in ALWAYS_SENT
    kind = field.type
    if absent and field.default is None and isinstance(kind, inspect.UnionType):
        kind = inspect.UnionType(tuple(one for one in kind.types if not isinstance(one, inspect.NoneType)))
    return f"  {field.encode_name}{'?' if absent else ''}: {written(kind)};"


def written(kind: inspect.Type) -> str:
    """A type as TypeScript writes it."""
    match kind:
        case inspect.Metadata():
            return written(kind.type)
        case inspect.LiteralType():
            return " | ".join(f'"{value}"' for value in kind.values)
        case inspect.UnionType():
            return " | ".join(dict.fromkeys(map(written, kind.types)))
        case inspect.ListType():
            return f"{written(kind.item_type)}[]"
        case inspect.DictType():
            return f"Record<{written(kind.key_type)}, {written(kind.value_type)}>"
        case inspect.StructType():
            return kind.cls.__name__
        case _:
            return SIMPLE[type(kind)]


if __name__ == "__main__":
    main()
