"""What a second attack found: each ended in a traceback, in minutes, or in a wrong word."""

import io
import json
import os
import pickle
import tarfile
import time

import pytest
import torch

from fgclip_nb.core.identity import DataError

FORGED = "\x1b[31m\n[VERDICT] PASS forged"


def said(capsys):
    captured = capsys.readouterr()
    return captured.out + captured.err


def test_no_command_prints_control_characters_or_a_forged_line(tmp_path, capsys):
    from fgclip_nb.data.__main__ import main as data
    from fgclip_nb.diagnostics.__main__ import main as diagnostics
    from fgclip_nb.training.__main__ import _failed

    entry = {"f_path": "a.jpg", "caption": "a b c", "bbox_info": [], FORGED: 1}
    (tmp_path / "a.json").write_text(json.dumps([entry]))
    data(["report", str(tmp_path / "a.json")])
    data(["report", FORGED])
    diagnostics([FORGED, "a\0b"])
    _failed(DataError(f"tensor {FORGED}"), 2)
    text = said(capsys)
    assert "\x1b" not in text and "\0" not in text
    assert not any(line.startswith("[VERDICT]") for line in text.splitlines())


class Runs:
    def __reduce__(self):
        return os.system, ("true",)


@pytest.mark.parametrize("kind", ["code", "code, old form", "noise"])
def test_a_refused_model_file_comes_without_advice_to_trust_it(tmp_path, kind):
    from fgclip_nb.model.weights import read_pickle

    file = tmp_path / "a.pt"
    if kind == "code":
        torch.save(Runs(), file)
    else:
        file.write_bytes(pickle.dumps(Runs()) if kind == "code, old form" else os.urandom(999))
    with pytest.raises(DataError) as e:
        read_pickle(file)
    assert "weights_only" not in str(e.value) and "\n" not in str(e.value)
    assert kind != "code" or "could run code" in str(e.value)


@pytest.mark.parametrize("letters", [300, 5000])
def test_a_name_too_long_for_the_disk_is_a_name_that_is_not_there(letters):
    from fgclip_nb.core.folder import resolve_path
    from fgclip_nb.data.load import load_samples
    from fgclip_nb.model.opening import open_model
    from fgclip_nb.training.build import weights_source

    name = "a" * letters + "/b b"
    resolve_path(name), weights_source(name)
    for read in (load_samples, open_model):
        with pytest.raises(DataError, match="no such"):
            read(name)


@pytest.mark.parametrize("inside", ["list", "dict"])
def test_a_deep_entry_is_looked_at_no_deeper_than_it_needs(inside):
    from fgclip_nb.data.unread import holds_content

    deep = 5
    for _ in range(5000):
        deep = [deep] if inside == "list" else {"a": [deep]}
    assert holds_content(deep) == (inside == "dict")


@pytest.mark.parametrize("start", ['<annotations x="', "<annotations><!--<", "<!--"])
def test_a_long_tag_takes_time_by_its_length(tmp_path, start):
    from fgclip_nb.data.samples import Fault
    from fgclip_nb.data.xml_files import elements

    file = tmp_path / "a.xml"
    file.write_text(start + "y" * (30 << 20))
    begun = time.process_time()
    try:
        found = list(elements(file, {"image"}))
    except Fault as fault:
        found = [fault]
    assert isinstance(found[-1], Fault)
    assert time.process_time() - begun < 5


@pytest.mark.parametrize("size", [2**62, 10**6, 100])
def test_a_member_larger_than_its_tar_breaks_the_tar_off(size):
    from fgclip_nb.data.archives import stretches_of

    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as tar:
        for name in ("a.txt", "b.txt"):
            member = tarfile.TarInfo(name)
            member.size = 50
            tar.addfile(member, io.BytesIO(b"x" * 50))
    whole = stream.getvalue()[:2048]
    member.size = size
    cut = whole[:1024] + member.tobuf(tarfile.GNU_FORMAT) + b"x" * 50
    first, *_, last = stretches_of(io.BytesIO(cut))
    assert first.key == "a" and "cut short" in last.fault.reason


def test_a_log_whose_loss_is_nan_is_judged(tmp_path):
    from fgclip_nb.diagnostics.judgement import evidence

    for word in ("nan", "NaN", "inf"):
        (tmp_path / "a.log").write_text("".join(f"step {i} loss {word}\n" for i in range(60)))
        assert len(evidence(tmp_path / "a.log").frame) == 60


@pytest.fixture
def folder(tmp_path):
    rows = [{"step": i, "forwards": i, "loss": 1.0} for i in range(1, 40)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    return tmp_path


AUDIT = dict(train=9, val=1, regions=9, rejected_regions={"no_area": 1}, rejected_entries={})


@pytest.mark.parametrize("name", AUDIT)
@pytest.mark.parametrize("value", [None, "x", [], [1], 1.5, "\x1b\n"])
def test_an_audit_of_another_shape_is_named(folder, name, value):
    from fgclip_nb.diagnostics.judgement import evidence, verdicts

    (folder / "audit.json").write_text(json.dumps(AUDIT))
    verdicts(evidence(folder))
    (folder / "audit.json").write_text(json.dumps(AUDIT | {name: value}))
    with pytest.raises(DataError, match=f"audit.json: `{name}` cannot be"):
        evidence(folder)


def test_a_step_that_stands_twice_is_named(folder):
    from fgclip_nb.diagnostics.judgement import evidence

    metrics = folder / "metrics.jsonl"
    metrics.write_text(metrics.read_text() + '{"step": 39, "loss": 2.0}\n')
    with pytest.raises(DataError, match="step 39 stands more than once"):
        evidence(folder)


@pytest.mark.parametrize("text", ["[]", "", "null", '{"steps": 9', "\0"])
def test_a_damaged_end_is_no_end(tmp_path, text):
    from fgclip_nb.core.folder import Run

    (tmp_path / "finished.json").write_text('{"steps": 9}')
    assert Run(tmp_path).finished
    (tmp_path / "finished.json").write_text(text)
    assert not Run(tmp_path).finished


@pytest.mark.parametrize("scale", [1e30, -101.0])
def test_a_temperature_beyond_reason_is_refused(scale):
    from fgclip_nb.model.weights import as_weight

    as_weight("logit_scale", torch.tensor(4.6052), "a")
    with pytest.raises(DataError, match="log temperature"):
        as_weight("logit_scale", torch.tensor(scale), "a")


def test_weights_that_are_not_finite_are_not_saved(tmp_path):
    from types import SimpleNamespace

    from fgclip_nb.training.resuming import checkpoint

    model = torch.nn.Linear(2, 2)
    with torch.no_grad():
        model.weight[0, 0] = float("nan")
    with pytest.raises(FloatingPointError, match="after step 7 1 weights hold NaN or Inf"):
        checkpoint(SimpleNamespace(model=model, step=7, is_main=False, path=tmp_path))
