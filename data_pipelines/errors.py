"""Errors that a person can mend: the message names the thing, both values and the remedy."""

import difflib
import errno
import os
import re
import shutil


class UserError(Exception):
    """Bad input or a refused request; the message says what to do about it."""

    exit_code = 2


# What a machine may refuse -> what to do about it. No change of the code would help.
_REMEDIES = {
    errno.ENOSPC: "Free some space",
    errno.EDQUOT: "Free some of your quota",
    errno.EROFS: "Choose a folder that can be written",
    errno.EACCES: "Choose a folder that you may write, or ask for the permission",
    errno.EIO: "Look at the disk (dmesg) or choose another folder",
    errno.EMFILE: "Allow more open files (ulimit -n)",
}


_LESS_MEMORY = (
    "Raise config.mesh.fsdp, or, with another --workdir, raise config.train.accumulation or halve "
    "config.data.batch_size and config.data.eval_batch_size"
)
# TensorStore adds pages of it to every error.
_SPECIFICATION = re.compile(r" \[(tensorstore_spec|source locations)=.*?'\]")


def machine_fault(error: BaseException | None, folder: os.PathLike | None = None) -> str | None:
    """What to say if the machine has refused something, as a full disk does; None if it has not.

    Libraries in C++ give the system's words in an error of their own: those are looked for too.

    Args:
      error: with its causes.
      folder: that was written; of a full disk it is named, with the bytes that are free.
    """
    while error is not None:
        for number, remedy in _REMEDIES.items():
            if getattr(error, "errno", None) == number or os.strerror(number) in str(error):
                said = _SPECIFICATION.sub("", str(error).splitlines()[-1])
                if number == errno.ENOSPC and folder and os.path.isdir(folder):
                    free = shutil.disk_usage(folder).free
                    said += f": {folder} has {free:,} bytes free"
                return f"{said}. {remedy}, and give the same command again."
        if isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error):
            said = str(error).partition("\n")[0] or "There is no memory left"
            return f"{said}. {_LESS_MEMORY}, and give the same command again."
        error = error.__cause__ or error.__context__
    return None


def suggest(name: str, known) -> str:
    """`" did you mean 'homo'?"` when something known is close to `name`, else `""`."""
    lowered = {str(k).lower(): str(k) for k in known}
    close = difflib.get_close_matches(str(name).lower(), lowered, n=1)
    return f" Did you mean {lowered[close[0]]!r}?" if close else ""


def check_known(what: str, value, known) -> None:
    """Refuses a name that is not among `known`; `what` says where it was given."""
    if value not in known:
        raise UserError(
            f"Unknown {what} {value!r}.{suggest(value, known)} Known: {', '.join(map(str, known))}."
        )
