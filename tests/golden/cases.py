"""The reference's cases in data/, and how a folder for users is made of one."""

import json
import shutil
from pathlib import Path

from megatron_hypenet.export.from_hf import import_hf
from megatron_hypenet.export.hf_config import mixer_spellings
from megatron_hypenet.export.remote_code import ENTRIES, remote_files
from megatron_hypenet.export.to_hf import export_hf

CASES = sorted(path for path in (Path(__file__).parent / "data").iterdir() if path.is_dir())


def is_trained(case: Path) -> bool:
    """Whether this package trains models with the mixers of this case."""
    config = json.loads((case / "hypenet/config.json").read_text())
    return set(config["mixer_types"]) <= mixer_spellings().keys()


TRAINED = [case for case in CASES if is_trained(case)]


def export_case(case: Path, kind: str, target: Path) -> None:
    """The model through a checkpoint; what no checkpoint can hold as it is, with its code."""
    if kind == "qwen3" or is_trained(case):
        checkpoint = target.with_name(f"{target.name}-checkpoint")
        import_hf(case / kind, checkpoint)
        export_hf(checkpoint, target)
        shutil.rmtree(checkpoint)
        return
    shutil.copytree(case / kind, target)
    config = json.loads((target / "config.json").read_text())
    configuration, modeling = ENTRIES
    config["auto_map"] = {
        "AutoConfig": f"{configuration}.HypeNetConfig",
        "AutoModelForCausalLM": f"{modeling}.HypeNetForCausalLM",
    }
    (target / "config.json").write_text(json.dumps(config))
    for name, text in remote_files(set(config["mixer_types"])).items():
        (target / name).write_text(text)
