"""Files of weights that hold code: refused wherever one is read, and nothing of them is run."""

import os
import pickle
from pathlib import Path

import pytest
import torch

from ltnorm import pickled

RUN = "results/evil/seed0"
COMMANDS = {
    f"eval {RUN}": 1,
    f"inspect {RUN}": 1,
    f"retrain {RUN} --method crt": 1,
    "train --recipe tiny.yaml --pretrained evil.pth": 2,
}


class Calls:
    """What calls a function when it is unpickled."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def plain(content, path):
    path.write_bytes(pickle.dumps(content))


def oldest(content, path):
    path.write_bytes(pickle.dumps(content, 0))


def legacy(content, path):
    torch.save(content, path, _use_new_zipfile_serialization=False)


WAYS = {"plain": plain, "oldest": oldest, "zip": torch.save, "legacy": legacy}


def evil(kind: str, mark: Path) -> dict:
    """A checkpoint that creates a file when it is unpickled."""
    call = {
        "system": Calls(os.system, f"touch {mark}"),
        "exec": Calls(exec, f"open({str(mark)!r}, 'w')"),
    }[kind]
    return {"format": 1, "recipe": "", "counts": [1], "index_sha256": "", "epoch": 1, "model": call}


@pytest.mark.parametrize("kind", ["system", "exec"])
@pytest.mark.parametrize("way", WAYS)
def test_code_is_refused_by_every_command_and_not_run(way, kind, failing, tmp_path):
    mark, run = tmp_path / "created", tmp_path / RUN
    run.mkdir(parents=True)
    for path in (run / "checkpoint.pt", tmp_path / "evil.pth"):
        WAYS[way](evil(kind, mark), path)
    for command, code in COMMANDS.items():
        text = failing(command, code=code)
        assert "would run code" in text, command
        assert kind in text
        assert "nothing was run" in text
        assert "evil" in text
    assert not mark.exists()
    pickle.loads(pickle.dumps(evil(kind, mark)))  # it is what it is said to be
    assert mark.exists()


def test_tensors_are_read_and_damage_is_not_called_code(tmp_path):
    file = tmp_path / "weights.pt"
    for way in (torch.save, legacy):
        way({"state": torch.nn.Linear(2, 3).double().state_dict(), "n": [1, "a", None]}, file)
        assert pickled.code(file) == []
        assert pickled.read(file)["state"]["weight"].dtype == torch.float64
        whole = file.read_bytes()
        for damaged in (whole[: len(whole) // 2], b"", b"text", bytes(200)):
            file.write_bytes(damaged)
            with pytest.raises(pickled.Refused, match="damaged") as caught:
                pickled.read(file)
            assert caught.value.code is None
