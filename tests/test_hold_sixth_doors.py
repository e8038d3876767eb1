"""The doors for users' own code: loss terms, rules, readers, and modules named in `extensions`.
Whatever such code does is told by its name and line. It needs modules, files and runs, so it is no
cell."""

import functools
import importlib
import json
import site
import sys
import textwrap
from types import SimpleNamespace

import micro
import pytest
import torch
from synthetic_runs import synthetic_run

from fgclip_nb.core import own_code
from fgclip_nb.core.config import LossParams, TrainConfig, load_extensions
from fgclip_nb.core.folder import Run
from fgclip_nb.core.identity import ConfigError, DataError
from fgclip_nb.data.load import load_samples
from fgclip_nb.data.readers import READERS, reader
from fgclip_nb.data.samples import Sample
from fgclip_nb.diagnostics import rules as rule_room
from fgclip_nb.diagnostics.judgement import by_cause, evidence, verdicts
from fgclip_nb.diagnostics.recorder import Recorder
from fgclip_nb.diagnostics.report import conclude
from fgclip_nb.diagnostics.rules import RULES, UNKNOWN, Rule, rule
from fgclip_nb.losses.bank import MemoryBank
from fgclip_nb.losses.objective import compute_losses, total_loss
from fgclip_nb.losses.table import TERMS, loss_term
from fgclip_nb.losses.terms import LossTerm
from fgclip_nb.training.checkpoints import load_term_tensors, term_tensors
from fgclip_nb.training.memory import OutOfMemory, explain_memory


# what declaring a parameter changes of a dataclass
DECLARING = ("__init__", "__repr__", "__eq__", "__match_args__", "__dataclass_fields__")


@pytest.fixture(autouse=True)
def restored():
    "What a test registers is gone after it, the parameters that its terms declare too."
    tables = [(table, dict(table)) for table in (RULES, TERMS, READERS)]
    classes = [(cls, dict(vars(cls))) for cls in (LossParams, TrainConfig)]
    yield
    for cls, before in classes:
        for name in set(vars(cls)) - set(before):
            delattr(cls, name)
        for name in DECLARING:
            setattr(cls, name, before[name])
    for table, before in tables:
        table.clear()
        table.update(before)


@pytest.fixture
def modules(tmp_path, monkeypatch):
    "Function: import a module of this name and text by `extensions`."
    monkeypatch.syspath_prepend(str(tmp_path))

    def write(name, text, load=True):
        (tmp_path / f"{name}.py").write_text(textwrap.dedent(text))
        importlib.invalidate_caches()
        sys.modules.pop(name, None)
        return load_extensions(name) if load else None

    return write


# ---- rules --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return synthetic_run(tmp_path_factory.mktemp("rules"))


FAILING = {
    "raises": ("raise KeyError('x')", "KeyError: 'x' ("),
    "ends": ("import sys; sys.exit(0)", "ends Python (sys.exit(0))"),
    "none": ("return 'bad'", "it returned 'bad'"),
    "short": ("return 'fail', 1", "return (result, value, why)"),
    "odd": ("return 'catastrophe', 1, 'why'", "'catastrophe'"),
    "thing": ("return 'fail', object(), 'why'", "neither a number nor a text"),
    "mute": ("return 'fail', 1, None", "texts"),
    "wide": ("import torch; return 'fail', torch.ones(2), 'why'", "neither a number nor a text"),
    "huge": ("return 'fail', 10**400, 'why'", "neither a number nor a text"),
    "deep": ("return deep(ev)\ndef deep(ev):\n    return deep(ev)", "RecursionError"),
}


@pytest.mark.parametrize("name", FAILING)
def test_a_rule_that_fails_is_told_and_the_others_stand(run, modules, name):
    body, words = FAILING[name]
    before = {v.name: v for v in verdicts(run)}
    text = f"from fgclip_nb.diagnostics.rules import rule\n@rule('loss')\ndef own_{name}(ev):\n"
    modules(f"own_rule_{name}", text + f"    {body}\n")
    judged = {v.name: v for v in verdicts(run)}
    own = judged.pop(f"own_{name}")
    assert judged == before
    assert own.result == UNKNOWN and words in own.why and f"own_rule_{name}.py, line" in own.why


def test_numbers_of_numpy_and_torch_are_numbers(run):
    import numpy as np

    @rule("loss")
    def own_numpy(ev):
        return "fail", np.float32(1.5), "too high"

    @rule("loss")
    def own_torch(ev):
        return "pass", torch.tensor(2.5), "as it should be"

    judged = {v.name: v for v in verdicts(run)}
    assert (judged["own_numpy"].result, judged["own_numpy"].value) == ("fail", 1.5)
    assert type(judged["own_torch"].value) is float


def test_a_rule_changes_no_evidence_but_its_own(run):
    before = verdicts(run)

    @rule("loss", rank=-5)
    def own_mutator(ev):
        ev.frame["loss"] = float("nan")
        ev.frame.loc[:, "loss_region"] = 9.0
        ev.params.clear()
        ev.facts.clear()
        return "pass", 1, "it wrote into everything"

    assert [v for v in verdicts(run) if v.name != "own_mutator"] == before


def test_an_own_rule_against_a_parameter_that_changed_cannot_be_judged(run):
    @rule("loss")
    def own_limit(ev):
        return "fail", 1, f"over {ev.limit('noise_limit')}"

    ev = evidence(run)
    assert {v.name: v.result for v in verdicts(ev)}["own_limit"] == "fail"
    ev.facts["resumed"] = [dict(step=5, changed=dict(noise_limit=[1, 2]))]
    assert {v.name: v.result for v in verdicts(ev)}["own_limit"] == UNKNOWN


def test_a_fault_in_a_rule_of_the_package_is_seen_by_its_tests(run, monkeypatch):
    def fails(ev):
        raise KeyError("x")

    fails.__module__ = rule_room.__name__
    monkeypatch.setitem(RULES, "shipped", Rule("shipped", fails))
    with pytest.raises(RuntimeWarning, match="fgclip_nb has a fault in its rule shipped: KeyError"):
        verdicts(run)
    with pytest.warns(RuntimeWarning):  # and a user has all other verdicts
        judged = {v.name: v.result for v in verdicts(run)}
    assert judged["shipped"] == UNKNOWN and len(judged) > 20


@pytest.mark.parametrize(
    "about", [dict(limit="nothing"), dict(limit="tracker"), dict(rank="first"), dict(threshold=3)]
)
def test_a_rule_that_cannot_be_told_is_refused(about):
    with pytest.raises(ConfigError, match="the rule `own`: its"):

        @rule("loss", **about)
        def own(ev):
            return None


@pytest.mark.ci
def test_the_report_is_written_beside_a_failing_rule(tmp_path):
    found = synthetic_run(tmp_path)

    @rule("loss")
    def own_raises(ev):
        raise KeyError("x")

    conclude(found)
    kept = {v["name"]: v for v in json.loads((found.path / "verdicts.json").read_text())}
    assert kept["own_raises"]["result"] == UNKNOWN and len(kept) > 20
    assert "own raises" in (found.path / "report.html").read_text()


# ---- names --------------------------------------------------------------------------------------

NAMED = {
    "term": """
        from fgclip_nb.losses.table import loss_term
        @loss_term("dense", weight="dense_weight", default=0.5, range=(0, 10))
        def f(features):
            return {}
        """,
    "rule": """
        from fgclip_nb.diagnostics.rules import rule
        @rule("loss")
        def own(ev):
            return "pass", {}, "fine"
        """,
    "reader": """
        from fgclip_nb.data.readers import reader
        @reader("mine", ("pic",))
        def read(row, src):
            return {}
        """,
}


@pytest.mark.parametrize("kind", NAMED)
def test_a_name_is_not_taken_from_other_code(modules, kind):
    modules(f"first_{kind}", NAMED[kind].replace("{}", "1"))
    with pytest.raises(ConfigError) as told:
        modules(f"second_{kind}", NAMED[kind].replace("{}", "2"))
    for place in (f"first_{kind}.py, line ", f"second_{kind}.py, line "):
        assert place in str(told.value)
    modules(f"first_{kind}", NAMED[kind].replace("{}", "3"))  # edited, and loaded again


@pytest.mark.parametrize(
    "text",
    [
        """
        from fgclip_nb.losses.table import loss_term
        @loss_term("region", weight="region_weight")
        def region_term(features):
            return features["image_features"].mean()
        """,
        """
        from fgclip_nb.diagnostics.rules import rule
        @rule("loss")
        def finite_numbers(ev):
            return "pass", 1, "always fine"
        """,
        """
        from fgclip_nb.data.readers import reader
        @reader("coco", ("images",), of="document")
        def read(row, src):
            return None
        """,
    ],
)
def test_what_the_package_has_is_not_replaced(modules, text):
    tables = [dict(t) for t in (RULES, TERMS, READERS)]
    with pytest.raises(ConfigError, match="already, and taker"):
        modules("taker", text)
    assert [RULES, TERMS, READERS] == tables


def test_a_cell_may_be_run_twice(tmp_path):
    for number in (1, 2):
        cell = textwrap.dedent(NAMED["term"]).replace("{}", str(number))
        names = dict(__name__="__main__")
        exec(compile(cell, f"/tmp/ipykernel_1/{number}.py", "exec"), names)
    assert TERMS["dense"].compute is names["f"]


def test_two_terms_do_not_declare_one_weight_otherwise(modules):
    modules("first_weight", NAMED["term"].replace("{}", "1"))
    other = NAMED["term"].replace('"dense"', '"other"').replace("0.5", "5").replace("f(", "g(")
    with pytest.raises(ConfigError, match="declared for the loss term `dense` of first_weight"):
        modules("second_weight", other)


# ---- modules ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text, words",
    [
        ("import sys\nsys.exit(0)\n", "ends Python (sys.exit(0))"),
        ("def f(:\n", "SyntaxError"),
        ("raise RuntimeError('no licence')\n", "no licence"),
        ("import not_there_pkg\n", "No module named 'not_there_pkg'"),
    ],
)
def test_a_module_that_cannot_be_imported_is_told(modules, text, words):
    modules("broken_module", text, load=False)
    with pytest.raises(ConfigError) as told:
        TrainConfig.from_params(dict(extensions="broken_module"))
    assert "'broken_module' cannot be imported" in str(told.value) and words in str(told.value)
    assert "broken_module.py, line" in str(told.value)


# ---- loss terms ---------------------------------------------------------------------------------


def batch_of(n=2):
    ids = torch.arange(n)
    return SimpleNamespace(sample_ids=ids, caption_ids=ids)


def features_of(n=2):
    torch.manual_seed(0)
    rows = {
        k: torch.randn(n, 4, requires_grad=True) * 1 for k in ("image_features", "text_features")
    }
    return rows | dict(logit_scale=torch.tensor(2.6592, requires_grad=True))


def losses_with(compute, bank=None, weight=0.5, **more):
    loss_term("own", weight="own_weight", default=weight, range=(0, 10))(compute)
    return compute_losses(features_of(), batch_of(), bank, cfg=TrainConfig(), **more)


def own_fails(features):
    return features["no_such"]


def own_ends(features):
    sys.exit(0)


def own_wide(features):
    return features["image_features"].sum(1)


def own_complex(features):
    return features["image_features"].mean() + 0j


def own_float(features):
    return 1.5


def own_of_vector(features):
    return LossTerm.of(features["image_features"].sum(1))


def own_measure(features):
    return LossTerm.of(features["image_features"].mean(), weird=[1, 2])


def own_ids(features, batch):
    batch.sample_ids.zero_()
    return features["image_features"].mean()


def own_rows(features):
    features["image_features"].mul_(0)
    return features["image_features"].mean()


def own_bank(features, bank):
    bank.region_features.fill_(float("nan"))
    return features["image_features"].mean()


def own_buffer(features, bank):
    bank.region_features = bank.region_features * 2
    return features["image_features"].mean()


WRONG = {
    own_fails: "failed: KeyError: 'no_such' (",
    own_ends: "ends Python",
    own_wide: "shape (2,)",
    own_complex: "complex64",
    own_float: "a float",
    own_of_vector: "its `loss`",
    own_measure: "its `weird`",
    own_ids: "changed batch.sample_ids in place",
    own_rows: "changed features.image_features in place",
    own_bank: "changed bank.region_features in place",
    own_buffer: "changed bank.region_features in place",
}


@pytest.mark.parametrize("compute", WRONG)
def test_a_terms_mistake_is_told_by_its_name(compute):
    with pytest.raises(ConfigError) as told:
        losses_with(compute, MemoryBank(4, 4, 0))
    assert "the loss term `own`" in str(told.value) and WRONG[compute] in str(told.value)


@pytest.mark.parametrize("kept", ["text", [1], {"a": 1}, None, torch.ones(1, requires_grad=True)])
def test_what_no_checkpoint_can_hold_is_told_by_term_and_key(kept):
    def own_keeps(features, state):
        state["names"] = kept
        return features["image_features"].mean()

    with pytest.raises(ConfigError, match=r"the loss term `own` keeps `state\['names'\]`"):
        losses_with(own_keeps, states={})


def test_what_a_term_may_keep_can_be_saved(tmp_path):
    from safetensors.torch import load_file, save_file

    def own_keeps(features, state):
        state["now"] = state["before"] = features["image_features"].mean().detach()
        state["seen"] = state.get("seen", 0) + 1
        state["share"] = 0.1
        return features["image_features"].mean()

    states = {}
    losses_with(own_keeps, states=states)
    save_file(term_tensors(states), tmp_path / "terms.safetensors")
    back = load_term_tensors(load_file(tmp_path / "terms.safetensors"), "cpu")["own"]
    assert back["now"] == back["before"] == states["own"]["now"]
    assert (int(back["seen"]), float(back["share"])) == (1, 0.1)


def test_a_state_of_another_size_is_told():
    def own_grown(features, state):
        return features["image_features"].mean() * (state["seen"] + torch.ones(5)).sum()

    with pytest.raises(ConfigError, match=r"its state held seen \(3,\)"):
        losses_with(own_grown, states=dict(own=dict(seen=torch.ones(3))))


def test_configuration_and_dicts_are_copies():
    def own_takes(features, batch, cfg):
        features.pop("text_features")
        batch.caption_ids = None
        cfg.global_weight = 0
        return features["image_features"].mean()

    assert set(losses_with(own_takes)) == {"loss_global_short", "loss_own"}
    cfg = TrainConfig()
    terms = compute_losses(features_of(), batch_of(), cfg=cfg)
    assert cfg.global_weight == 1 and total_loss(terms, cfg) != 0


def test_memory_that_a_term_runs_out_of_is_told_as_such():
    def own_large(features):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 99.00 GiB.")

    cfg = TrainConfig()
    state = SimpleNamespace(
        cfg=cfg, data=SimpleNamespace(train=[]), accelerator=SimpleNamespace(device="cuda")
    )
    with pytest.raises(OutOfMemory, match="Lower first"), explain_memory(state, "step 1"):
        losses_with(own_large)


@pytest.mark.parametrize("weight", ["learning_rate", "memory_bank_size", "tracker", "weight_decay"])
def test_a_weight_is_a_parameter_that_weighs_a_loss(weight):
    with pytest.raises(ConfigError, match=f"`own` has the weight `{weight}`"):
        loss_term("own", weight=weight)(own_float)
    loss_term("own", weight="region_weight")(own_float)  # one that weighs a loss may be shared


@pytest.mark.parametrize(
    "more", [dict(default="x"), dict(default=5000), dict(default=1, range=(3,)), dict(default=[1])]
)
def test_a_weight_that_cannot_be_declared_names_its_term(more):
    with pytest.raises(ConfigError, match="the loss term `own`"):
        loss_term("own", weight="own_weight", **more)(own_float)


def test_arguments_that_nobody_can_ask_by_are_refused():
    for asks in (lambda *features: 0, lambda **features: 0):
        with pytest.raises(TypeError, match="ask by name"):
            loss_term("own", weight="own_weight", default=1)(asks)


@pytest.mark.parametrize("said", [[("a",)], [("a", "much", "b")], 1 / 3])
def test_expected_levels_that_are_none_name_their_term(said):
    from fgclip_nb.diagnostics.expectations import term_levels

    loss_term("own", weight="own_weight", default=1, expected=lambda facts: said)(own_float)
    with pytest.raises(ConfigError, match="the loss term `own`: `expected`"):
        list(term_levels(TERMS["own"], None))


# ---- a term that trains nothing -----------------------------------------------------------------


def own_detached(features):
    return features["image_features"].mean().detach()


def own_number(features):
    return torch.tensor(3)


def own_leaf(features):
    return torch.ones((), requires_grad=True) * 2


def own_part(features):
    x = features["image_features"].mean()
    return dict(sound=x, idle=x.detach() + 1)


def own_sound(features):
    return features["image_features"].mean()


def own_scale(features):
    return features["logit_scale"].exp()


def own_zero(features):
    return torch.zeros(())


def own_now_and_then(features, state):
    state["n"] = state.get("n", 0) + 1
    return features["image_features"].mean() if state["n"] % 2 else torch.zeros(())


IDLE = {
    own_detached: ["own"],
    own_number: ["own"],
    own_leaf: ["own"],
    own_part: ["own_idle"],
    own_sound: [],
    own_scale: [],
    own_zero: [],
    own_now_and_then: [],
}


def recorded(folder, compute, steps=12, forwards=1, weight=0.5):
    "A run of so many steps whose only own term is this one."
    cfg = TrainConfig(tracker="none")
    told = []
    log = SimpleNamespace(info=str, warning=told.append)
    recorder = Recorder(folder, cfg, log)
    states = {}
    for step in range(1, steps + 1):
        for _ in range(forwards):
            terms = losses_with(compute, states=states, weight=weight)
            recorder.forward(terms, features_of())
        recorder.step(step)
    recorder.close()
    (folder / "params.yaml").write_text("seed: 0\n")
    return Run(folder), told


@pytest.mark.parametrize("compute", IDLE)
def test_a_term_without_gradient_is_told_and_a_constant_one_is_not(tmp_path, compute):
    found, warned = recorded(tmp_path, compute)
    assert len(warned) == len(IDLE[compute])
    for words, name in zip(warned, IDLE[compute]):
        assert words.startswith(f"step 1: the loss term `{name}` is ")
    judged = {v.name: v for v in verdicts(found)}
    assert ("own_has_gradient" in judged) == bool(IDLE[compute])
    if IDLE[compute]:
        first = next(v for v in by_cause(list(judged.values())) if v.name.startswith("own_"))
        assert first.name == "own_has_gradient" and f"`{IDLE[compute][0]}`" in first.why
    if IDLE[compute] == ["own"]:
        assert judged["own_loss_rise"].result == UNKNOWN  # it does not "diverge"
    if compute in (own_sound, own_scale):  # a sound run has no such column
        assert not [c for c in evidence(found).frame if "no_gradient" in c]


def test_a_term_that_only_some_forwards_have_is_not_accused(tmp_path):
    found, told = recorded(tmp_path, own_now_and_then, forwards=2)
    judged = verdicts(found)
    assert not told and "own_has_gradient" not in {v.name for v in judged}


def test_a_term_that_is_only_watched_is_not_accused():
    loss_term("own", weight="own_weight", default=0.5, range=(0, 10))(own_detached)
    cfg = TrainConfig(own_weight=0)
    assert compute_losses(features_of(), batch_of(), cfg=cfg)["loss_own"].trains


def test_what_is_measured_without_gradients_is_not_accused():
    with torch.no_grad():
        assert losses_with(own_sound)["loss_own"].trains


# ---- readers ------------------------------------------------------------------------------------


@pytest.fixture
def rows(tmp_path):
    file = tmp_path / "mine.jsonl"
    file.write_text(
        "".join(json.dumps(dict(pic=f"{k}.png", words="a mug")) + "\n" for k in range(4))
    )
    return file


def fails_at_one(row, src):
    name = row.text("pic")
    return src.sample(id=str(1 / (name != "2.png")), media=name, caption=row.text("words"))


def fails_late(row, src):
    name = row.text("pic")
    yield src.sample(id=name, media=name, caption=row.text("words"))
    if name == "2.png":
        sys.exit(0)


def wrong_at_one(row, src):
    if row.text("pic") == "2.png":
        return 5
    return src.sample(id=row.text("pic"), media=row.text("pic"), caption=row.text("words"))


def odd_at_one(row, src):
    name = row.text("pic")
    return Sample(id=5 if name == "2.png" else name, media=name, caption=row.text("words"))


def text_at_one(row, src):
    name = row.text("pic")
    sample = src.sample(id=name, media=name, caption=row.text("words"))
    return "a sample" if name == "2.png" else sample


@pytest.mark.parametrize("read", [fails_at_one, fails_late, wrong_at_one, odd_at_one, text_at_one])
def test_a_reader_that_fails_at_an_entry_is_a_reject_of_it(rows, read):
    reader("mine", ("pic", "words"), rank=1)(read)
    samples, rejects = load_samples(rows, missing="keep")
    assert len(samples) == 3
    (told,) = [r for r in rejects if r.rule == "reader_failed"]
    assert (told.file.endswith("mine.jsonl"), told.entry, told.entries) == (True, "line 3", 1)
    assert (
        "the reader `mine` failed: " in told.reason
        and f"in {read.__name__}" in told.reason
        or (f"{__name__}.{read.__name__} (" in told.reason)
    )


def test_a_reader_that_fails_when_asked_is_told_with_file_and_entry(rows):
    def wider(entry):
        return entry["width"] > 3

    reader("mine", wider, rank=-1)(fails_at_one)
    with pytest.raises(DataError) as told:
        load_samples(rows, missing="keep")
    for words in ("mine.jsonl, line 1: ", "reader `mine`", "KeyError: 'width'", "in wider"):
        assert words in str(told.value)


def test_a_reader_of_files_that_fails_is_told_with_file_and_entry(tmp_path):
    def read_lines(path, src):
        for n, line in enumerate(open(path), 1):
            src.entry = f"line {n}"
            yield src.sample(id=line.split()[1], media="a.jpg", caption="A mug.")

    reader("lines", lambda p: str(p).endswith(".lst"), of="file", suffixes=(".lst",))(read_lines)
    (tmp_path / "a.lst").write_text("a 1\nb\nc 2\n")
    with pytest.raises(DataError) as told:
        load_samples(tmp_path / "a.lst", missing="keep")
    for words in ("a.lst, line 2: ", "reader `lines`", "IndexError", "in read_lines"):
        assert words in str(told.value)


def test_a_document_that_a_reader_fails_at_is_a_reject(tmp_path):
    def read_album(album, src):
        return [src.sample(id=p["id"], media="a.jpg") for p in album["album"]]

    reader("album", ("album",), of="document")(read_album)
    (tmp_path / "album.json").write_text(json.dumps(dict(album=[dict(name="a")])))
    samples, rejects = load_samples(tmp_path / "album.json", missing="keep")
    assert not samples and "the reader `album` failed: KeyError: 'id'" in rejects[0].reason


# ---- a whole run --------------------------------------------------------------------------------

CELL = """
    import torch
    from fgclip_nb.diagnostics.rules import rule
    from fgclip_nb.losses.table import loss_term

    @loss_term("dense", weight="dense_weight", default=0.5, range=(0, 10), help="own")
    def dense_term(features, batch):
        return torch.tensor(float(features["image_features"].square().mean()))

    @rule("loss")
    def own_rule(ev):
        return "fail", object(), "why"
"""


@pytest.mark.ci
def test_a_whole_run_tells_both_and_is_finished(tmp_path):
    (tmp_path / "my_doors.py").write_text(textwrap.dedent(CELL))
    params = micro.micro_world(tmp_path) | dict(extensions="my_doors", output=str(tmp_path / "run"))
    assert micro.run(params, None, functools.partial(site.addsitedir, str(tmp_path))) == 0
    found = Run(tmp_path / "run")
    judged = {v["name"]: v for v in json.loads((found.path / "verdicts.json").read_text())}
    assert found.finished and (found.path / "report.html").exists()
    assert judged["dense_has_gradient"]["result"] == "fail"
    assert "my_doors.py, line" in judged["own_rule"]["why"]
    assert "step 1: the loss term `dense` is" in (found.path / "training.log").read_text()


def test_where_code_stands_is_known_of_partials_and_objects():
    class Called:
        def __call__(self, features):
            return 0

    assert own_code.name_of(Called()).endswith("Called")
    assert own_code.same_code(functools.partial(own_zero), own_zero)
    assert not own_code.same_code(Called(), own_zero)
    loss_term("own", weight="own_weight", default=1)(Called())
