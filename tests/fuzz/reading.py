"""Read an input as a verb of the command would: an exit code, the result on stdout, the error on
stderr."""

import json
from pathlib import Path

from megatron_hypenet.cli.main import report_fault, run

ROOT = Path(__file__).resolve().parents[2]
TOKENIZER = ROOT / "assets" / "tiny-qwen3"


def verb(*words):
    """Return a command line; FOLDER and OUT stand for the two places."""

    def read(folder, out):
        return run([word.replace("FOLDER", str(folder)).replace("OUT", str(out)) for word in words])

    return read


def call(function):
    """Return a function of (folder) as a verb would call it: its result is printed as JSON, its
    fault as the command would say it."""

    def read(folder, out):
        try:
            print(json.dumps(function(folder), default=str))
        except Exception as fault:
            return report_fault(fault, debug=False)
        return 0

    return read
