"""api_reference.py: docs/api.md, from the docstrings of what is this package's own.

    python tools/api_reference.py            writes docs/api.md
    python tools/api_reference.py --check    says whether it is up to date

Names that are torch's objects are torch's to document.  Of classes that mirror one of torch's, only
what they define themselves is listed.
"""

from __future__ import annotations

import argparse
import enum
import importlib
import inspect
import pathlib
import re
import sys

ROOT = pathlib.Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "api.md"

MODULES = {
    "dcp_native": "`import dcp_native as dcp`. Everything else that it has is torch's own object.",
    "dcp_native.state_dict": "State dicts with names that do not depend on wrappers.",
    "dcp_native.staging": "Stagers, for `async_save(async_stager=)` and for use on their own.",
    "dcp_native.format_utils": "Conversions between checkpoints and torch.save files.",
    "dcp_native._consolidate_hf_safetensors": "Joins of safetensors shard files.",
}
BESIDE = {
    "dcp_native": {
        "MergedTraces": "dcp_native._trace_merge",
        "SaveFuture": "dcp_native._uploads",
    }
}
"""What calls return without having a name in the package."""

TORCHS = "torch.distributed.checkpoint"

INTRODUCTION = """\
# API reference

Written by `tools/api_reference.py` from the docstrings: not to be edited. What is not here and
has a name in `dcp_native` is the object of that name in `torch.distributed.checkpoint`.
"""


def is_ours(value: object) -> bool:
    module = getattr(value, "__module__", None) or ""
    return module.split(".")[0] == "dcp_native" and (inspect.isclass(value) or callable(value))


def names_of(module_name: str) -> list[str]:
    module = importlib.import_module(module_name)
    listed = getattr(module, "__all__", None) or [n for n in vars(module) if n[0] != "_"]
    return sorted((n for n in dict.fromkeys(listed) if is_ours(getattr(module, n))), key=str.lower)


def parameter(p: inspect.Parameter) -> str:
    text = {p.VAR_POSITIONAL: "*", p.VAR_KEYWORD: "**"}.get(p.kind, "") + p.name
    spaced = p.annotation is not p.empty
    if spaced:
        shown = p.annotation
        text += ": " + (shown if isinstance(shown, str) else inspect.formatannotation(shown))
    if p.default is not p.empty:
        is_enum = isinstance(p.default, enum.Enum)
        default = str(p.default) if is_enum else repr(p.default)
        text += f" = {default}" if spaced else f"={default}"
    return text


def signature_of(name: str, value: object, method: bool = False) -> str:
    try:
        signature = inspect.signature(value)
    except (TypeError, ValueError):
        return name
    parts, star = [], False
    for p in list(signature.parameters.values())[1 if method else 0 :]:
        star = star or p.kind is p.VAR_POSITIONAL
        if p.kind is p.KEYWORD_ONLY and not star:
            parts.append("*")
            star = True
        parts.append(parameter(p))
    returns = signature.return_annotation
    result = "" if returns in (signature.empty, None, "None") else f" -> {returns}"
    line = f"{name}({', '.join(parts)}){result}"
    if len(line) <= 96:
        return line
    return f"{name}(\n" + "".join(f"    {part},\n" for part in parts) + f"){result}"


def paragraphs(doc: str) -> str:
    """The docstring as text: literals and roles as code, sections as they stand."""
    text = re.sub(r":(?:func|class|meth|mod|data):`([^`]*)`", r"`\1`", doc)
    text = re.sub(r"``([^`]*)``", r"`\1`", text)
    out, in_section = [], False
    for line in text.splitlines():
        heading = re.fullmatch(r"([A-Z][\w ,()']*[^.]):", line)
        if heading and not line.startswith(" "):
            out += ["", f"*{heading[1]}*", ""]
            in_section = True
        elif in_section and (entry := re.match(r"    (?! )([\w*, `/.]+?): (.*)", line)):
            out.append(f"- `{entry[1].strip('`')}`: {entry[2]}")
        elif line.startswith("        ") and in_section:
            out.append("  " + line.strip())
        elif line.startswith("    ") and in_section:
            out.append(line.strip())
        else:
            in_section = in_section and not line
            out.append(line)
    return re.sub(r"\n{3,}", "\n\n", "\n".join(out)).strip()


def entry(title: str, name: str, value: object, level: str, method: bool = False) -> list[str]:
    is_type = isinstance(value, type)
    plain = is_type and issubclass(value, (BaseException, enum.Enum))
    shown = name if plain else signature_of(name, value, method)
    shown = f"class {shown}" if is_type and not plain else shown
    doc = inspect.cleandoc(value.__doc__ or "")
    lines = [f"{level} {title}", "", "```text", shown, "```", ""]
    return [*lines, paragraphs(doc), ""] if doc else lines


def describe(module_name: str, name: str, value: object) -> list[str]:
    mirrored = importlib.import_module(module_name.replace("dcp_native", TORCHS))
    if getattr(getattr(mirrored, name, None), "__doc__", None) == value.__doc__:
        return [f"### {name}", "", "torch's function of this name, over our `load`.", ""]
    lines = entry(name, name, value, "###")
    if not isinstance(value, type) or issubclass(value, enum.Enum):
        return lines
    for attribute, member in vars(value).items():
        if attribute.startswith("_") or getattr(member, "__doc__", None) is None:
            continue
        if isinstance(member, property):
            doc = paragraphs(inspect.cleandoc(member.__doc__))
            lines += [f"#### {name}.{attribute}", "", doc, ""]
        elif inspect.isfunction(member):
            lines += entry(f"{name}.{attribute}", f"{attribute}", member, "####", method=True)
    return lines


def page() -> str:
    lines = [INTRODUCTION]
    for module_name, what in MODULES.items():
        module = importlib.import_module(module_name)
        lines += [f"## {module_name}", "", what, ""]
        values = {n: getattr(module, n) for n in names_of(module_name)}
        for name, place in BESIDE.get(module_name, {}).items():
            values[name] = getattr(importlib.import_module(place), name)
        for name, value in sorted(values.items(), key=lambda item: item[0].lower()):
            lines += describe(module_name, name, value)
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).rstrip() + "\n"


def main() -> int:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--check", action="store_true", help="only say whether the page is up to date")
    if p.parse_args().check:
        same = PAGE.exists() and PAGE.read_text(encoding="utf-8") == page()
        print("up to date" if same else f"{PAGE} is out of date: run tools/api_reference.py")
        return 0 if same else 1
    PAGE.write_text(page(), encoding="utf-8")
    print(f"wrote {PAGE}")
    return 0


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    sys.exit(main())
