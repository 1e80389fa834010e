"""A lesson's config.yaml: sections, overlays, comments that are the help text, and `key=value` on the command line.

A comment may begin with the bound of its value, which every value is held to, wherever it comes from:

    steps: 5400       # >=1: training steps              a whole number, because the bound has no decimal point
    lr: 4e-3          # >0.0: of Adam                    a number
    skip: 0.0         # >=0.0 <1.0: share left out       both hold
    drop: 0.1         # 0.0..1.0: share withheld         from ... to, both included
    low: -20.0        # any: lowest log-SNR              any number
    kind: vp          # vp|subvp|ve: the process         one of these words; "" is the empty one
    sigma_1: auto     # auto|>0.0: the largest noise     a word or a number
    mults: [1, 2]     # [>=1]: of each level             a list of such; [>=1]2 of two, [>=1]2+ of two or more
    prompt: ""        # text: what to draw               any text
    clip: true        # true|false: whether to clip      on or off

No number may be infinite or NaN; a whole one without an upper limit may have nine digits. A bound may also say when its
value has an effect; on the command line a value that would have none is refused:

    tolerance: 1e-3   # >0.0 if solver=dopri5 or bits: ...      solver is dopri5, or bits is not 0, "", false or none
    guidance: 3.0     # any unless labels=none: ...             labels is something else
"""

import difflib
import re
from types import SimpleNamespace

import yaml

from . import bounds
from .errors import UserError

SCRIPTS = ("train", "sample", "reproduce")             # sections that belong to one script each
OVERLAYS = ("gpu", "quick", "smoke")                   # sections of changes, laid over the others when asked for

# Keys of every script with their values and comments; they need not stand in config.yaml.
COMMON = {
    "seed": (0, ">=0 <9e15: seed of everything random"),
    "device": ("auto", "auto|cpu|cuda|mps: what computes; mps is the GPU of a Mac"),
    "precision": ("auto", "auto|fp32|bf16|fp16: auto takes what this machine is fast at"),
    "threads": (0, "0..1024: CPU threads; 0: all cores"),
    "runs": ("runs", "text: the folder that new files go to"),
    "publish": (False, "true|false: also write pictures, numbers and weights to results/"),
    "smoke": (False, "true|false: tiny sizes, for the tests: lays the section `smoke` over the others"),
    "gpu": ("auto", "true|false|auto: lay the section `gpu` over the others; auto: when CUDA is found"),
    "debug": (False, "true|false: after an error show where in the code it came from"),
}
TRAIN = {"processes": (1, "auto|>=1: processes of one thread each on a CPU; auto: 2 where it has the cores")}
KINDS = {                                              # keys that utils reads, where a script has them
    "resume": "true|false", "metrics": "true|false", "weights": "text", "out": "text", "gif": "text", "npz": "text"}
QUICK = {"quick": (False, "true|false: a quick look: lays the section `quick` over the others")}
MOST = 10**9                                           # of a whole number whose bound has no upper limit


class Section(SimpleNamespace):
    """Values by attribute (`cfg.lr`); `**section` unpacks them as keyword arguments."""

    def keys(self):
        return vars(self).keys()

    def __getitem__(self, key):
        return getattr(self, key)


def plain(value):
    """Sections as dicts, all the way down, so that JSON can hold them."""
    return {name: plain(item) for name, item in vars(value).items()} if isinstance(value, Section) else value


class _Loader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):
    """YAML in which a key stands once in its section, and a value in one place.

    An alias could name what it stands in, or make a billion values of ten lines.
    """

    def get_single_node(self):
        root, seen = super().get_single_node(), set()
        todo = [root] if root else []
        while todo:
            node, names = todo.pop(), set()
            if id(node) in seen:
                raise yaml.MarkedYAMLError(problem="an alias (&, *) puts one value in two places",
                                           problem_mark=node.start_mark)
            seen.add(id(node))
            if isinstance(node, yaml.SequenceNode):
                todo += node.value
            for key, value in node.value if isinstance(node, yaml.MappingNode) else ():
                if isinstance(key, yaml.ScalarNode):
                    if key.value in names:
                        raise yaml.MarkedYAMLError(problem=f"there are two {key.value}", problem_mark=key.start_mark)
                    names.add(key.value)
                todo += [key, value]
        return root


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
    values = parse(_text(path), str(path))
    if not isinstance(values, dict):
        raise UserError(f"{path} must hold sections of keys, not {values!r:.40}")
    for name, keys in values.items():
        if not isinstance(name, str) or not isinstance(keys, dict | None) or not all(
                isinstance(key, str) for key in keys or ()):
            raise UserError(f"{path}: the section {name} must hold lines of the form `key: value`")
    return {name: keys or {} for name, keys in values.items()}


def read_bounds(path):
    """The bounds that stand in the comments of a config.yaml: {(section, key): Bound}; those of COMMON included."""
    found = {(section, key): bound for section, key, _, comment in _lines(path)
             if section not in OVERLAYS and key and (bound := bounds.split(comment)[0])}
    texts = {key: comment for key, (_, comment) in (COMMON | TRAIN | QUICK).items()}
    texts |= {key: f"{kind}: " for key, kind in KINDS.items()}
    return {(section, key): bounds.split(text)[0] for section in SCRIPTS for key, text in texts.items()} | found


def load(path, section, argv=(), cuda=False, quiet=False):
    """Read config.yaml for the script whose section is `section`, apply overlays and `key=value` arguments.

    Returns a Section of Sections; the common keys are in the script's own section. `lr=1` means the script's
    own section, or the only other section that has such a key; `unet.channels=48` names the section.
    cuda: whether there is a GPU; then the section `gpu` is laid over the others, but for reproduce.py or device=cpu.
    quiet: do not tell that it is.
    """
    values = read(path)
    overlays = {name: values.pop(name, {}) for name in OVERLAYS}
    common = COMMON | (TRAIN if section == "train" else {}) | (QUICK if overlays["quick"] else {})
    values[section] = {key: default for key, (default, _) in common.items()} | values.get(section, {})
    if {"-h", "--help"} & set(argv):
        print(help_text(path, section, common))
        raise SystemExit(0)
    given = find(values, section, argv)
    bound = read_bounds(path)
    for target in values:
        for key, value in values[target].items():
            values[target][key] = within(f"{target}.{key}", value, bound.get((target, key)), path.name)

    def lay(name):
        for target, keys in overlays[name].items():
            if not isinstance(keys, dict):
                raise UserError(f"{path}: {target} in the section {name} must hold lines of the form `key: value`")
            for key, value in keys.items():
                _set(values, target, key, value, bound.get((target, key)), f"{path.name}, section {name}")

    # A reader's own gpu=... stands; device=cpu has no GPU; the arms of a claim are what the claim says on every device.
    asked = {name: text for target, name, _, text in given if target == section}
    automatic = values[section]["gpu"] == "auto" and "gpu" not in asked and section != "reproduce"
    if overlays["gpu"] and cuda and automatic and asked.get("device", values[section]["device"]) != "cpu":
        if not quiet:
            print("GPU found: using the section `gpu` of config.yaml (gpu=false turns it off)")
        lay("gpu")
        values[section]["gpu"] = True                  # what a checkpoint remembers: that it is laid
    for target, name, key, text in given:              # from left to right: what comes later wins
        value = _value(text, values[target][name], f"{key}={text}")
        _set(values, target, name, value, bound.get((target, name)), f"{key}={text}")
        if name in OVERLAYS and values[section].get(name) is True:
            lay(name)
    for target, name, key, text in given:
        if why := (target, name) in bound and bound[target, name].idle(name, values[target]):
            raise UserError(f"{key}={text}: {why}")
    return Section(**{name: Section(**keys) for name, keys in values.items()})


def _text(path):
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(f"{path} is missing: get it back with `git checkout {path.name}`") from None
    except UnicodeDecodeError:
        raise UserError(f"{path} is not UTF-8 text: get it back with `git checkout {path.name}`") from None


def _lines(path):
    """What a config.yaml says line by line: (section, key, value as it stands there, comment).

    The key is "" in the line that begins a section, None in one that only goes on with a comment.
    """
    section = None
    for line in _text(path).splitlines():
        if match := re.match(r"^(\w+):\s*(?:#\s*(.*))?$", line):
            section = match[1]
            yield section, "", "", match[2] or ""
        elif match := re.match(r"^  (\w+):\s*(.*?)\s*(?:#\s*(.*))?$", line):
            yield section, match[1], match[2], match[3] or ""
        elif match := re.match(r"^\s{4,}#\s*(.*)$", line):
            yield section, None, "", match[1]


def _value(text, old, where):
    """The value that `text` stands for, where `old` stood: text stays as it is typed."""
    if not text:
        return text
    if not isinstance(old, str) or old == "auto":
        return parse(text, where)
    quoted = len(text) > 1 and text[0] == text[-1] and text[0] in "'\""
    return text[1:-1] if quoted else text


def within(name, value, bound, where):
    """The value if it is finite and within its bound; as a float where the bound is one of numbers with a point."""
    for item in value if isinstance(value, list) else [value]:
        if isinstance(item, (int, float)) and not -1e300 < item < 1e300:
            raise UserError(f"{where}: {name} must be finite, not {float('nan') if item != item else 'infinite'}")
        if bound and bound.open and type(item) is int and abs(item) > MOST:
            raise UserError(f"{where}: {name} must be at most {MOST}")
    if bound and bound.is_text and not bound.is_list and not isinstance(value, (list, dict)):
        value = "" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
    if bound and not bound.holds(value):
        raise UserError(f"{where}: {name} must be {bound}, not {value!r}")
    return float(value) if bound and bound.real and type(value) is int else value


def split(argument):
    """(key, value) of an argument; --resume is resume=true."""
    key, equals, value = argument.lstrip("-").partition("=")
    if not equals or not key:
        if not key or not argument.startswith("--"):
            raise UserError(f"{argument}: write arguments as key=value")
        value = "true"
    return key, value


def find(values, section, argv):
    """What arguments key=value mean: a list of (section, key, key as it was typed, text)."""
    return [(*_find(values, section, key), key, text) for key, text in map(split, argv)]


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
        others = [owner for owner in owners if owner not in SCRIPTS]
        if len(others) == 1:
            return others[0], key
    known = list(values[section]) + [f"{s}.{k}" for s in values if s != section for k in values[s]]
    short = {k.split(".")[-1]: k for k in reversed(known)}
    near = difflib.get_close_matches(key, known, 1, 0.5) or [
        short[k] for k in difflib.get_close_matches(name or key, list(short), 1, 0.5)]
    raise UserError(f"unknown key {key}: " + (f"did you mean {near[0]}?" if near else "--help lists all keys"))


def _set(values, target, key, new, bound, where):
    """Replace values[target][key] by `new` if it is of the same kind and within its bound."""
    if target not in values or key not in values[target]:
        raise UserError(f"{where}: there is no key {target}.{key}")
    old = values[target][key]
    new = within(key, new, None, where)
    if isinstance(old, float) and type(new) is int:
        new = float(new)
    if isinstance(old, list) and isinstance(new, list) and old and all(isinstance(item, float) for item in old):
        new = [float(item) if type(item) is int else item for item in new]
    if old == "auto" or old is None or bound and bound.words and bound.numbers:
        pass                                           # of several kinds: the bound alone decides
    elif isinstance(old, str) and not isinstance(new, (list, dict)):
        new = "" if new is None else str(new)
    elif type(new) is not type(old) or isinstance(old, list) and {type(item) for item in new} - {
            *map(type, old or new), *[int, float] * bool(bound and bound.real)}:
        example = str(old).lower() if isinstance(old, bool) else old
        raise UserError(f"{where}: {key} takes {_kind(old)} (such as {example}), not {new!r}")
    values[target][key] = within(key, new, bound, where)


def _kind(value):
    return {bool: "true or false", int: "a whole number", float: "a number", list: "a list", str: "text"}.get(
        type(value), "a value")


def help_text(path, section, common=COMMON):
    """The keys of one script with their values and the comments of config.yaml."""
    lines = [f"usage: python {section}.py key=value ...   (values of {path.name})",
             "A comment begins with what the value may be: >=1 a whole number, >0.0 a number, 0.0..1.0 from and to,",
             "any: any number, a|b one of these, [>=1] a list of such, text: any text; all of it: utils/config.py"]
    found = set()
    for owner, key, value, comment in _lines(path):
        if owner not in SCRIPTS + OVERLAYS or owner == section:
            name = ("" if owner == section else f"{owner}.") + (key or "")
            if key:
                found.add(name)
                lines.append(f"  {name + '=' + value:32} {comment}")
            elif key == "":
                lines += ["", f"{owner}:" + (f"  {comment}" if comment else "")]
            elif lines[-1].startswith("  "):
                lines.append(f"  {'':32} {comment}")
    lines += ["", "for every script:"]
    lines += [f"  {key + '=' + str(value).lower():32} {text}" for key, (value, text) in common.items()
              if key not in found]
    return "\n".join(lines)
