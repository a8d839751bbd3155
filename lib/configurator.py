"""Settings: a flat dataclass per script, config files that are Python, and `--key=value`.

    python train.py config/llama_16m.py config/my_changes.py --learning_rate=3e-4 --overwrite

Config files are executed (they are code: run only those you trust) and may compute; every public
name in one must be a setting, so a typo cannot pass. Helpers start with `_`. Later files win over
earlier ones, the command line over files. A bare `--flag` is True, lists are `a,b`.
"""
import dataclasses
import difflib
import inspect
import json
import math
import os
import runpy
import sys
import traceback
import typing

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


def launch(main, cls=None, others=False):
    """Call main with the settings of `cls`, or else with the arguments. What the user typed or gave, and
    what the machine cuts short, ends in one line; a fault of the code, or of a change to it, keeps its
    traceback."""
    open_streams()
    cfg = None
    try:
        cfg = configure(cls, others=others) if cls else sys.argv[1:]
        main(cfg)
        finish_streams()
    except SystemExit as e:  # a name may have a line break in it
        sys.exit(e.code.replace("\n", "\\n") if isinstance(e.code, str) else e.code)
    except KeyboardInterrupt:
        sys.exit("interrupted; the same command goes on, train.py's and distill.py's with --resume")
    except OSError as e:
        sys.exit(f"error: {e.filename or 'file'}: {e.strerror or e} ({place(e, ROOT)})")
    except Exception as e:
        if (type(e).__name__ == "OutOfMemoryError" or isinstance(e, MemoryError)
                or "can't allocate memory" in str(e)):
            sys.exit(f"error: out of memory{less_memory(cfg)}")
        if type(e).__name__ == "SafetensorError":  # disk full
            sys.exit(f"error: cannot write or read a checkpoint: {e} ({place(e, ROOT)})")
        raise


def less_memory(cfg):
    """The end of that sentence: which setting to lower and, to half of what it was, to what."""
    if hasattr(cfg, "micro_batch_size"):
        share = max(cfg.batch_size // int(os.environ.get("WORLD_SIZE", 1)), 1)  # of one rank
        used = cfg.micro_batch_size or share
        step = cfg.n_pairs if getattr(cfg, "contrastive", 0) else 1
        fit = [n for n in range(step, used // 2 + 1, step) if share % n == 0]
        if fit:
            return f" with micro_batch_size={used}; try --micro_batch_size={fit[-1]} (same results)"
        return f" with micro_batch_size={used}; try a smaller --loss_chunk (same results), --seq_len or model"
    for key, results in dict(batch_tokens="same", batch_size="other", workers="same").items():
        used = getattr(cfg, key, 1) or os.cpu_count()
        if used > 1:
            return f" with {key}={used}; try --{key}={used // 2} ({results} results)"
    return "; use a smaller model, or --device=cpu"


def open_streams():
    """Let nothing end because it cannot be printed: a stream that was closed at the start (a daemon's) is
    /dev/null, what a terminal cannot show is replaced, and a full disk or closed pipe (`| head`) is told by
    finish_streams."""
    while (fd := os.open(os.devnull, os.O_RDWR)) < 3:
        pass
    os.close(fd)
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode))
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
            stream.write, stream.flush = tolerant(stream, stream.write), tolerant(stream, stream.flush)


def tolerant(stream, method):
    def call(*args):
        try:
            return method(*args)
        except OSError as e:
            stream.unprinted = e
    return call


def finish_streams():
    """Exit if not all of the output could be printed; without a word if nobody reads on."""
    sys.stdout.flush()
    reason = getattr(sys.stdout, "unprinted", None)
    if reason:
        sys.exit(1 if isinstance(reason, BrokenPipeError) else
                 f"error: not all could be printed: {reason.strerror}")


def place(e, root):
    """'file, line n' of the innermost frame of an exception in files under `root`."""
    frames = [f for f in traceback.extract_tb(e.__traceback__)
              if f.filename.startswith(root) and "site-packages" not in f.filename]
    if not frames:
        return "outside the project"
    return f"{os.path.relpath(frames[-1].filename, ROOT)}, line {frames[-1].lineno}"


def configure(cls, argv=None, others=False):
    """The settings `cls` (a dataclass with defaults) after config files and flags.

    argv: list of arguments, default sys.argv[1:]. others: config files may hold settings of other
    scripts too. A class with a method `from_given` is made by it, of what was said alone. Prints the
    commented dataclass and exits on --help. Raises SystemExit with one line that names the setting, the
    value and the remedy.
    """
    argv = sys.argv[1:] if argv is None else argv
    if "--help" in argv or "-h" in argv:
        print(help_text(cls))
        sys.exit(0)
    types, values = typing.get_type_hints(cls), {}
    for path in (a for a in argv if not a.startswith("-")):
        for key, value in read_config_file(path).items():
            if key in types or not others:
                values[key] = checked(types, key, value, path)
    for flag in (a for a in argv if a.startswith("-")):
        if not flag.startswith("--"):
            sys.exit(f"error: '{flag}' is not a setting; write --key=value, or --help for the list")
        key, equals, text = flag[2:].partition("=")
        values[key] = checked(types, key, parsed(types, key, text) if equals else True, flag)
    return getattr(cls, "from_given", cls)(**values)


def read_config_file(path):
    """The public names a config file leaves behind, modules aside."""
    if not os.path.isfile(path):  # a pipe either
        sys.exit(f"error: no config file '{path}' (a setting is written --key=value, with no blank)")
    try:
        names = runpy.run_path(path)
    except SyntaxError as e:
        sys.exit(f"error: {path}, line {e.lineno}: {e.msg}")
    except (Exception, SystemExit) as e:  # whatever the user's own code raises
        sys.exit(f"error: {path} failed: {type(e).__name__}: {' '.join(str(e).split())} ({place(e, path)})")
    return {k: v for k, v in names.items() if not k.startswith("_") and not inspect.ismodule(v)}


def need(cfg, **checks):
    """Exit at the first setting that is not good: need(cfg, epochs=(cfg.epochs > 0, "at least 1"))."""
    for key, (good, wanted) in checks.items():
        if not good:
            sys.exit(f"error: {key}={getattr(cfg, key)} must be {wanted}")


def non_defaults(cfg, ignore=()):
    """The settings that differ from their defaults, as JSON gives them back: what a result is compared by.
    A new setting that stays at its default invalidates nothing."""
    changed = {f.name: getattr(cfg, f.name) for f in dataclasses.fields(cfg)
               if getattr(cfg, f.name) != f.default and f.name not in ignore}
    return json.loads(json.dumps(changed))


def differences(old, new, ignore=()):
    """What two dicts of settings have otherwise, in words; '' = nothing."""
    return ", ".join(f"{k}: {old.get(k)} -> {new.get(k)}" for k in {**old, **new}
                     if old.get(k) != new.get(k) and k not in ignore)


def parsed(types, key, text):
    """The text of a flag as the setting's type; text that does not fit stays text for checked()."""
    kind = types.get(key, str)
    if typing.get_origin(kind) is tuple:
        return tuple(part for part in text.split(",") if part)
    if kind is bool:
        return {"true": True, "false": False}.get(text.lower(), text)
    try:
        return kind(text) if kind in (int, float) else text
    except ValueError:
        return text


def checked(types, key, value, where):
    """`value` as the type of setting `key`, or exit naming both and `where` it was written."""
    if key not in types:
        near = difflib.get_close_matches(key, types, 1)
        hint = (f"did you mean '{near[0]}'?" if near else
                "--help lists this script's; in a config file, a name of yours begins with _")
        sys.exit(f"error: {where}: there is no setting '{key}': {hint}")
    kind = types[key]
    if kind is float and type(value) is int and abs(value) < 2 ** 63:
        value = float(value)
    if typing.get_origin(kind) is typing.Literal:
        fits, wanted = value in typing.get_args(kind), "one of " + ", ".join(typing.get_args(kind))
    elif typing.get_origin(kind) is tuple:
        fits = isinstance(value, (list, tuple)) and all(isinstance(v, str) for v in value)
        value, wanted = tuple(value) if fits else value, "a list of strings (on the command line: a,b)"
    else:
        fits = type(value) is kind
        wanted = {"str": "text", "bool": "True or False"}.get(kind.__name__, kind.__name__)
    if fits and (kind is int and not 0 <= value < 2 ** 63 or kind is float and not 0 <= value < math.inf):
        fits, wanted = False, "a finite number, 0 or more"
    if fits and any("\udc80" <= c <= "\udcff" for v in (value if type(value) is tuple else [value])
                    for c in str(v)) and key != "prompt":
        fits, wanted = False, "a name in UTF-8 (rename it)"
    if not fits:
        sys.exit(f"error: {where}: '{key}' wants {wanted}, got {value!r}")
    return value


def check_seeds(seeds):
    """Exit unless `seeds`, a setting that is a list of texts, are whole numbers and each there once."""
    for seed in seeds:
        number = seed.isascii() and seed.isdecimal() and len(seed) < 19 and seed == str(int(seed))
        if not number or seeds.count(seed) > 1:
            sys.exit(f"error: seeds: '{seed}' is not a whole number, too large, or there twice")


def help_text(cls):
    """The script's docstring and the commented dataclasses: the manual is the code."""
    sources = [inspect.getsource(c) for c in reversed(cls.__mro__[:-1])]
    return "\n".join([sys.modules["__main__"].__doc__ or "", "Settings and defaults:", ""] + sources)
