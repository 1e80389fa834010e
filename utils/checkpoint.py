"""Checkpoints: the whole state of a training in one file, from which it goes on bit for bit.

A run keeps the newest, last.pt, and the one before, previous.pt. A file holds tensors and plain values, never code.
"""

import io
import json
import math
import os
import sys
import zipfile

import torch

from .config import plain
from .errors import Diverged, UserError, disk_error
from .files import atomic, numbered, read_json, short
from .weights import fill, state_of

FORMAT = "zero-to-hero checkpoint 1"
NEEDED = {"lesson", "config", "step", "seconds", "states", "scaler", "random", "random_cuda"}
# What may change on --resume, and what may, too, but that is told and recorded.
FREE = ("runs", "publish", "resume", "debug", "gpu", "preview_every", "save_every", "log_every",
        "processes")
TOLD = ("steps", "lr", "device", "precision", "threads")


# ------------------------------------------------------------------ files
def write_checkpoint(folder, **content):
    """Write last.pt whole, keeping the one before as previous.pt."""
    packed = io.BytesIO()                              # serialised in memory: a full disk is then a plain OSError
    torch.save({"format": FORMAT, **content}, packed)
    last = folder / "last.pt"
    with atomic(last) as temporary:
        temporary.write_bytes(packed.getvalue())
        if last.exists():
            os.replace(last, folder / "previous.pt")


def read_checkpoint(path, lesson):
    """A checkpoint's content. UserError if it is damaged or foreign."""
    if not path.is_file():                             # a pipe would wait for ever
        raise UserError(f"{short(path)} is a folder or a device, not a checkpoint")
    try:
        with zipfile.ZipFile(path) as archive:
            if archive.testzip():
                raise ValueError("damaged")
        saved = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:                         # whatever a damaged or malicious file provokes
        if isinstance(error, OSError) and disk_error(error):
            raise
        raise UserError(f"{short(path)} is damaged or no checkpoint ({type(error).__name__})") from None
    if not isinstance(saved, dict) or saved.get("format") != FORMAT or NEEDED - set(saved) or not _sound(saved):
        raise UserError(f"{short(path)} is not a checkpoint of this course")
    if saved["lesson"] != lesson:
        raise UserError(f"{short(path)} belongs to {saved['lesson']}, not to {lesson}")
    return saved


def _sound(saved):
    """Whether a checkpoint's parts are of the kinds and sizes that a training leaves."""
    try:
        config, noise = json.loads(saved["config"]), torch.get_rng_state()
        most = config["train"]["steps"] if "train" in config else math.inf
        return (type(saved["step"]) is int and 0 < saved["step"] <= most
                and 0 <= saved["seconds"] < math.inf
                and all(isinstance(saved[name], dict) for name in ("states", "scaler"))
                and all(isinstance(section, dict) for section in config.values())
                and len(saved["random"]) > 0 and isinstance(saved["random_cuda"], list)
                and all(state.dtype == noise.dtype and state.shape == noise.shape for state in saved["random"])
                and all(isinstance(step, int) and isinstance(values, dict)
                        for step, values in saved.get("records", []))
                and all(type(end) is int for end in saved.get("ends", [])))
    except (ValueError, TypeError, AttributeError, LookupError, RecursionError):
        return False


def checkpoints(folder):
    """Those that a run's folder has, the newest first."""
    return [folder / name for name in ("last.pt", "previous.pt") if (folder / name).exists()]


def kept(folder):
    """What a reader may go back to, for the message of a run that had to stop."""
    found = checkpoints(folder)
    return f"the last good checkpoint is {found[0]}" if found else "no checkpoint was saved yet"


# ------------------------------------------------------------------ going on
def to_resume(runs):
    """The folder of the newest run with a checkpoint in `runs`, of those that are not finished, if there are any."""
    folders = [p for p in numbered(runs) if checkpoints(p)]
    found = [p for p in folders if not finished(p)] or folders
    if not found:
        raise UserError(f"nothing to resume in {runs}: no run there has a checkpoint; start one without --resume")
    return found[-1]


def finished(folder):
    """Whether a run has left its weights, and of all the steps that it was last asked for."""
    if not (folder / "weights.safetensors").exists():
        return False
    try:
        made = read_json(folder / "run.json")
        return made.get("finished", math.inf) >= made["config"][made["script"]]["steps"]
    except (LookupError, OSError, TypeError, UserError):
        return True


def newest(folder, lesson):
    """The content of a run's newest checkpoint that can be used; says which cannot."""
    for path in checkpoints(folder):
        try:
            return read_checkpoint(path, lesson)
        except UserError as error:
            print(f"{error}", file=sys.stderr)
    raise UserError(f"no usable checkpoint in {folder}: delete that folder to resume an older run, "
                    "or start a new one without --resume")


def check_same(saved, config, script, folder):
    """A resumed run must have the values it was started with, or it would not be the same run.

    Returns what has changed of those that may: {key: (before, now)}.
    """
    old, new, changed, name = json.loads(saved["config"]), plain(config), {}, folder.name
    for section in new:
        if section in ("sample", "reproduce"):
            continue
        for key in sorted(set(old.get(section, {})) | set(new[section])):
            a, b = old.get(section, {}).get(key), new[section].get(key)
            if a != b and section == script and key in TOLD:
                changed[key] = a, b
            elif a != b and not (section == script and key in FREE):
                raise UserError(f"cannot resume {name}: it was started with {section}.{key}={a}, now it is {b}; "
                                "put that back or start a new run without --resume")
    if finished(folder) and new[script]["steps"] <= old[script]["steps"]:
        raise UserError(f"nothing to resume: run {name} is finished, {old[script]['steps']} steps; more of them go on "
                        f"from there (--resume steps={2 * old[script]['steps']}), or start a new run without --resume")
    if "steps" in changed and new[script]["steps"] < saved["step"]:
        raise UserError(f"cannot resume {name}: steps={new[script]['steps']}, but it was saved after step "
                        f"{saved['step']}; put a larger number")
    return changed


def check_data(saved, about, name):
    """A resumed run must learn from the images that it began with."""
    before = saved.get("data") or about
    for key, value in about.items():
        if before.get(key) != value:
            raise UserError(f"cannot resume {name}: its data {about['name']} had {key}={before.get(key)}, now {value}; "
                            "put that back or start a new run without --resume")


# ------------------------------------------------------------------ states
def states(objects, folder, step):
    """{name: state} of networks, optimizers and averages. Weights that are not finite are refused."""
    found = {name: state_of(item) for name, item in objects.items()}
    for name, item in objects.items():
        if isinstance(item, torch.nn.Module) and not all(
                bool(value.isfinite().all()) for value in item.state_dict().values() if value.is_floating_point()):
            raise Diverged(f"the weights of {name} are not finite after step {step}: stopped; {kept(folder)}. "
                           "Try a smaller lr or precision=fp32")
    return found


def load_states(objects, saved, folder):
    """Give the objects the states of a checkpoint that go by their names."""
    for name, item in objects.items():
        try:
            fill(item, saved["states"][name])
        except (AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
            raise UserError(f"the checkpoint in {folder} does not fit: {(str(error).splitlines() or ['?'])[0]}; "
                            "train anew without --resume") from None


def random_states(device, world):
    """The state of the noise of every process, under the names that a checkpoint has for it."""
    random = [torch.get_rng_state()]
    cuda = [torch.cuda.get_rng_state()] if device.type == "cuda" else []
    if world > 1:
        from accelerate.utils import gather_object

        random, cuda = gather_object(random), gather_object(cuda)
    return {"random": random, "random_cuda": cuda}


def set_random_states(saved, device, rank):
    """From here on this process draws the noise that it would have drawn after the checkpoint."""
    torch.set_rng_state(saved["random"][rank])
    if device.type == "cuda" and saved["random_cuda"]:
        torch.cuda.set_rng_state(saved["random_cuda"][rank])
