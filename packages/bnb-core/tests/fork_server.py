"""Runs Python commands in forks of a process that has imported torch; see ``conftest.ForkServer``.

Reads one request a line from standard input, answers one line on standard output.
"""

import json
import os
import runpy
import signal
import sys
import tempfile
import traceback
from typing import Any, NoReturn

import torch  # noqa: F401

SECONDS = 120


def execute(request: dict[str, Any], out: int, err: int) -> NoReturn:
    """Become the process that the request describes."""
    os.dup2(out, 1)
    os.dup2(err, 2)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    signal.alarm(SECONDS)
    os.environ.clear()
    os.environ.update(request["environment"])
    os.chdir(request["folder"])
    sys.path[0:1] = ["", *request["environment"].get("PYTHONPATH", "").split(os.pathsep)]
    code = 1
    try:
        code = evaluate(*request["arguments"])
    except SystemExit as error:
        code = exit_code(error)
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def evaluate(option: str, text: str, *arguments: str) -> int:
    """What ``python -c`` and ``python -m`` do."""
    sys.argv = [option, *arguments]
    if option == "-c":
        exec(compile(text, "<string>", "exec"), {"__name__": "__main__"})
    else:
        runpy.run_module(text, run_name="__main__", alter_sys=True)
    return 0


def exit_code(error: SystemExit) -> int:
    """What the interpreter makes of it."""
    if error.code is None or isinstance(error.code, int):
        return error.code or 0
    print(error.code, file=sys.stderr)
    return 1


def serve(request: dict[str, Any]) -> dict[str, Any]:
    """Fork, wait, and collect what was written."""
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        child = os.fork()
        if child == 0:
            execute(request, out.fileno(), err.fileno())
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        return {"code": code, "stdout": read(out), "stderr": read(err)}


def read(file: Any) -> str:
    """Everything in a file."""
    file.seek(0)
    return file.read().decode()


if __name__ == "__main__":
    for line in sys.stdin:
        print(json.dumps(serve(json.loads(line))), flush=True)
