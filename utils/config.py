"""A lesson's config.yaml: sections, overlays, comments that are the help text, and `key=value` on the command line."""

import difflib
import math
import re
from types import SimpleNamespace

import yaml

from .errors import UserError

OVERLAYS = ("gpu", "quick", "smoke")                   # sections of changes, laid over the others when asked for

# Keys of every script; they need not stand in config.yaml.
COMMON = {
    "seed": (0, "seed of everything random"),
    "device": ("auto", "auto, cpu or cuda"),
    "precision": ("auto", "auto, fp32, bf16 or fp16"),
    "threads": (0, "CPU threads; 0: all cores"),
    "runs": ("runs", "the folder that new files go to"),
    "publish": (False, "also write pictures, numbers and weights to results/"),
    "smoke": (False, "tiny sizes, for the tests: lays the section `smoke` over the others"),
    "gpu": ("auto", "lay the section `gpu` over the others: true, false, or auto (when CUDA is found)"),
}


class Section(SimpleNamespace):
    """Values by attribute (`cfg.lr`); `**section` unpacks them as keyword arguments."""

    def keys(self):
        return vars(self).keys()

    def __getitem__(self, key):
        return getattr(self, key)


class _Loader(yaml.SafeLoader):
    pass


_Loader.add_implicit_resolver(                         # YAML 1.1 reads 1e-4 as a string; this reads it as a number
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d[\d_]*)(\.[\d_]*)?([eE][-+]?\d+)$"), list("-+0123456789"))


def parse(text, where="value"):
    """YAML text -> plain values. UserError, with the line and column, if it is none."""
    try:
        return yaml.load(text, _Loader)                # a SafeLoader: builds plain values only
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        at = f" at line {mark.line + 1}, column {mark.column + 1}" if mark and "\n" in text else ""
        reason = getattr(error, "problem", None) or str(error) or "too deep"
        raise UserError(f"{where} is not readable{at}: {reason}; correct it") from None


def read(path):
    """The sections of a config.yaml: {section: {key: value}}."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(f"{path} is missing: get it back with `git checkout {path.name}`") from None
    except UnicodeDecodeError:
        raise UserError(f"{path} is not UTF-8 text: get it back with `git checkout {path.name}`") from None
    values = parse(text, str(path))
    if not isinstance(values, dict):
        raise UserError(f"{path} must hold sections of keys, not {values!r:.40}")
    for name, keys in values.items():
        if not isinstance(name, str) or not isinstance(keys, dict | None) or not all(
                isinstance(key, str) for key in keys or ()):
            raise UserError(f"{path}: the section {name} must hold lines of the form `key: value`")
    return {name: keys or {} for name, keys in values.items()}


def load(path, section, argv=(), cuda=False, quiet=False):
    """Read config.yaml for the script whose section is `section`, apply overlays and `key=value` arguments.

    Returns a Section of Sections; the common keys are in the script's own section. `lr=1` means the script's
    own section, or the only other section that has such a key; `unet.channels=48` names the section.
    quiet: do not tell that the GPU's overlay is used.
    """
    values = read(path)
    overlays = {name: values.pop(name, {}) for name in OVERLAYS}
    common = COMMON | (QUICK if overlays["quick"] else {})
    values[section] = {key: default for key, (default, _) in common.items()} | values.get(section, {})
    if {"-h", "--help"} & set(argv):
        print(help_text(path, section, common))
        raise SystemExit(0)
    given = [(*_find(values, section, key), key, text) for key, text in map(_split, argv)]

    def lay(name):
        for target, keys in overlays[name].items():
            if not isinstance(keys, dict):
                raise UserError(f"{path}: {target} in the section {name} must hold lines of the form `key: value`")
            for key, value in keys.items():
                _set(values, target, key, value, f"{path.name}, section {name}")

    automatic = values[section]["gpu"] == "auto" and not any(name == "gpu" for _, name, _, _ in given)
    if overlays["gpu"] and cuda and automatic:
        if not quiet:
            print("GPU found: using the section `gpu` of config.yaml (gpu=false turns it off)")
        lay("gpu")
    for target, name, key, text in given:              # from left to right: what comes later wins
        _set(values, target, name, _value(text, values[target][name], f"{key}={text}"), f"{key}={text}")
        if name in OVERLAYS and values[section].get(name) is True:
            lay(name)
    for target in values:
        for key, value in values[target].items():
            _check(key if target == section else f"{target}.{key}", key, value)
    return Section(**{name: Section(**keys) for name, keys in values.items()})


QUICK = {"quick": (False, "a quick look: lays the section `quick` over the others")}
POSITIVE = ("n", "steps", "batch_size", "batch", "timesteps", "channels", "groups", "patch", "lr", "log_every",
            "seeds", "sample_steps", "bound_images", "width", "depth", "heads", "head_dim", "layers", "tokens",
            "epsilon", "sigma_L")
NOT_NEGATIVE = ("seed", "threads", "warmup", "save_every", "preview_every", "clip", "dropout", "blocks", "limit",
                "drop", "eta")


def _value(text, old, where):
    """The value that `text` stands for, where `old` stood: text stays as it is typed."""
    if not text:
        return text
    if not isinstance(old, str) or old == "auto":
        return parse(text, where)
    quoted = len(text) > 1 and text[0] == text[-1] and text[0] in "'\""
    return text[1:-1] if quoted else text


def _check(name, key, value):
    """Bounds that hold for a key of this name in every lesson."""
    whole = key in POSITIVE and key not in ("lr", "epsilon", "sigma_L")
    if key in POSITIVE + NOT_NEGATIVE and isinstance(value, str | None) or whole and isinstance(value, float):
        raise UserError(f"{name} must be a {'whole ' * whole}number, not {value!r}")
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return
    if not math.isfinite(value):
        raise UserError(f"{name}={value} must be a finite number")
    if value <= 0 and key in POSITIVE:
        raise UserError(f"{name}={value} must be above zero")
    if value < 0 and key in NOT_NEGATIVE:
        raise UserError(f"{name}={value} must not be below zero")
    if key == "seed" and value >= 2**53:
        raise UserError(f"{name}={value} must be below 2**53")


def _split(argument):
    key, equals, value = argument.lstrip("-").partition("=")
    if not equals or not key:
        if not key or not argument.startswith("--"):
            raise UserError(f"{argument}: write arguments as key=value")
        value = "true"                                 # --resume is resume=true
    return key, value


def _find(values, section, key):
    """The (section, key) that the command line's `key` means."""
    target, dot, name = key.partition(".")
    if dot:
        if target in values and name in values[target]:
            return target, name
    elif key in values[section]:
        return section, key
    else:
        owners = [other for other in values if key in values[other]]
        others = [owner for owner in owners if owner not in ("train", "sample", "reproduce")]
        if len(others) == 1:
            return others[0], key
    known = list(values[section]) + [f"{s}.{k}" for s in values if s != section for k in values[s]]
    short = {k.split(".")[-1]: k for k in reversed(known)}
    near = difflib.get_close_matches(key, known, 1, 0.5) or [
        short[k] for k in difflib.get_close_matches(name or key, list(short), 1, 0.5)]
    raise UserError(f"unknown key {key}: " + (f"did you mean {near[0]}?" if near else "--help lists all keys"))


def _set(values, target, key, new, where):
    """Replace values[target][key] by `new` if it is of the same kind."""
    if target not in values or key not in values[target]:
        raise UserError(f"{where}: there is no key {target}.{key}")
    old = values[target][key]
    if isinstance(old, float) and isinstance(new, int) and not isinstance(new, bool):
        new = float(new)
    if isinstance(old, list) and isinstance(new, list) and old and all(isinstance(item, float) for item in old):
        new = [float(item) if type(item) is int else item for item in new]
    if key == "gpu" and not (isinstance(new, bool) or new == "auto"):
        raise UserError(f"{where}: gpu takes true, false or auto, not {new!r}")
    if old == "auto" or old is None:
        pass
    elif isinstance(old, str) and not isinstance(new, (list, dict)):
        new = "" if new is None else str(new)
    elif type(new) is not type(old) or isinstance(old, list) and {type(item) for item in new} - {
            type(item) for item in old or new}:
        example = str(old).lower() if isinstance(old, bool) else old
        raise UserError(f"{where}: {key} takes {_kind(old)} (such as {example}), not {new!r}")
    values[target][key] = new


def _kind(value):
    return {bool: "true or false", int: "a whole number", float: "a number", list: "a list", str: "text"}.get(
        type(value), "a value")


def help_text(path, section, common=COMMON):
    """The keys of one script with their values and the comments of config.yaml."""
    lines, current, found = [f"usage: python {section}.py key=value ...   (values of {path.name})"], None, set()
    for line in path.read_text().splitlines():
        if match := re.match(r"^(\w+):\s*(?:#\s*(.*))?$", line):
            current = match[1]
            if current not in ("train", "sample", "reproduce") + OVERLAYS or current == section:
                lines += ["", f"{current}:" + (f"  {match[2]}" if match[2] else "")]
        elif match := re.match(r"^  (\w+):\s*(.*?)\s*(?:#\s*(.*))?$", line):
            if current not in ("train", "sample", "reproduce") + OVERLAYS or current == section:
                prefix = "" if current == section else f"{current}."
                found.add(prefix + match[1])
                lines.append(f"  {prefix + match[1] + '=' + match[2]:32} {match[3] or ''}")
        elif (match := re.match(r"^\s{4,}#\s*(.*)$", line)) and lines[-1].startswith("  "):
            lines.append(f"  {'':32} {match[1]}")
    lines += ["", "for every script:"]
    lines += [f"  {key + '=' + str(value).lower():32} {text}" for key, (value, text) in common.items()
              if key not in found]
    return "\n".join(lines)
