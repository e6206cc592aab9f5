"""Settings: what a mistake is answered with, what wins over what, and that reading them stays quick."""

import ast
import dataclasses
import io
import re
import subprocess
import sys
import tokenize

import pytest
from conftest import ROOT, STAGE_SCRIPTS

from utils import config
from utils.config import ClusterConfig, Config, UserError, command_line, flatten, interpreter, load_config, parse_config

HEAVY = ("torch", "torchvision", "umap", "hdbscan", "sklearn", "scipy", "matplotlib", "kornia")
GROUPS = [f.name for f in dataclasses.fields(Config) if dataclasses.is_dataclass(getattr(Config(), f.name))]


def message(*overrides, path="") -> str:
    with pytest.raises(UserError) as error:
        load_config(str(path), overrides)
    return str(error.value)


@pytest.fixture
def yaml_file(tmp_path):
    """Write a config file, return its path."""

    def write(content: str | bytes):
        path = tmp_path / "mine.yaml"
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return write


BAD_OVERRIDES = {
    # unknown keys, with the nearest known one
    "coarse.epoch=3": "coarse.epoch: no such setting. Did you mean: 'coarse.epochs'?",
    "epochs=3": "epochs: no such setting. Did you mean: 'coarse.epochs'?",
    "filter.nviews=3": "filter.nviews: no such setting. Did you mean: 'filter.n_views'?",
    "filter.views.hflip=1": "filter.views.hflip: no such setting. Did you mean: 'filter.views.hflip_p'?",
    "qqq=1": "qqq: no such setting.",
    "qqq.www=1": "qqq: no such setting.",
    "force=true": "force: no such setting.",
    "config_path=x": "config_path: no such setting.",
    # wrong types
    "coarse.epochs=many": "coarse.epochs: Value 'many' of type 'str' could not be converted to Integer",
    "coarse.epochs=1.5": "coarse.epochs: Value '1.5' of type 'float' could not be converted to Integer",
    "coarse.epochs=": "coarse.epochs: Incompatible value 'None' for field of type 'int'",
    "data.download=maybe": "data.download: Value 'maybe' is not a valid bool (type str)",
    "cluster.min_cluster_size=few": "cluster.min_cluster_size: Value 'few' of type 'str' is incompatible with type "
    "hint 'Union[int, float]'",
    "coarse=3": "coarse: expected `name: value` entries, not 3",
    "filter.views=3": "filter.views: expected `name: value` entries, not 3",
    "filter=null": "filter: expected `name: value` entries, not None",
    "seeds=3": "seeds: expected a list such as [0], not 3",
    "reproduce.alphas=0.5": "reproduce.alphas: expected a list such as [0.1, 0.9], not 0.5",
    "data.coarse_map=3": "data.coarse_map: expected `name: value` entries, not 3",
    "data.coarse_map={a: b}": "data.coarse_map.a: Value 'b' (str) is incompatible with type hint "
    "'typing.List[typing.Any]'",
    # bad choices
    "filter.score=entropi": "filter.score: 'entropi' is not one of signed_max_prob, entropy, mutual_information, "
    "variation_ratio, margin. Did you mean: 'entropy'?",
    "augment=full": "augment: 'full' is not one of none, crop_flip, strong.",
    "precision=16": "precision: '16' is not one of auto, fp32, bf16. Did you mean: 'bf16'?",
    "device=gpu": "device: 'gpu' is not one of auto, cpu, cuda, cuda:<n>",
    "cluster.method=hdbscan": "cluster.method: 'hdbscan' is not one of umap_hdbscan, kmeans, gmm, random, oracle. "
    "Did you mean: 'umap_hdbscan'?",
    "cluster.noise=drop": "cluster.noise: 'drop' is not one of soft, keep, nearest.",
    "cluster.assign=all": "cluster.assign: 'all' is not one of none, nearest.",
    "cluster.cluster_selection_method=leaves": "cluster.cluster_selection_method: 'leaves' is not one of eom, leaf. "
    "Did you mean: 'leaf'?",
    "finetune.head=new": "finetune.head: 'new' is not one of replace, stack.",
    "multihead.init=random": "multihead.init: 'random' is not one of scratch, coarse.",
    # out of range
    "seed=-1": "seed: -1 is out of range; it must be at least 0 and at most 2147483647",
    "seeds=[0,-1]": "seeds: -1 is out of range; it must be at least 0 and at most 2147483647",
    "seeds=[1,1]": "seeds: [1, 1] must name at least one seed, each once",
    "seeds=[]": "seeds: [] must name at least one seed, each once",
    "threads=-1": "threads: -1 is out of range; it must be at least 0",
    "data.val_fraction=0": "data.val_fraction: 0.0 is out of range; it must be greater than 0 and at most 0.9",
    "coarse.epochs=0": "coarse.epochs: 0 is out of range; it must be at least 1",
    "coarse.lr=nan": "coarse.lr: nan is out of range; it must be greater than 0 and finite",
    "finetune.fine_lr=inf": "finetune.fine_lr: inf is out of range; it must be greater than 0 and finite",
    "train.batch_size=1": "train.batch_size: 1 is out of range; it must be at least 2",
    "filter.keep_fraction=0": "filter.keep_fraction: 0.0 is out of range; it must be greater than 0 and at most 1",
    "filter.views.hflip_p=2": "filter.views.hflip_p: 2.0 is out of range; it must be at least 0 and at most 1",
    "crop_flip.hflip_p=2": "crop_flip.hflip_p: 2.0 is out of range; it must be at least 0 and at most 1",
    "multihead.alpha=1.1": "multihead.alpha: 1.1 is out of range; it must be at least 0 and at most 1",
    "reproduce.alphas=[0.5,2]": "reproduce.alphas: 2.0 is out of range; it must be at least 0 and at most 1",
    "model.mlp=[]": "model.mlp: 0 is out of range; it must be at least 1",
    "cluster.k_min=20": "cluster.k_max: 10 is out of range; it must be at least 20",
    "cluster.min_cluster_size=1": "cluster.min_cluster_size: 1 is neither a count of 2 or more nor a fraction below 1",
    "cluster.min_cluster_size=2.5": "cluster.min_cluster_size: 2.5 is neither a count of 2 or more nor a fraction "
    "below 1",
    "metrics.max_points=1": "metrics.max_points: 1 is out of range; it must be at least 10",
    # names that would leave the run folder
    "name=../elsewhere": "name: '../elsewhere' is not a folder name of letters, digits and . _ + -",
    "cluster.source=a b": "cluster.source: 'a b' is not a folder name of letters, digits and . _ + -",
    "finetune.labels=/tmp": "finetune.labels: '/tmp' is not a folder name of letters, digits and . _ + -",
    "features.source=a/../..": "features.source: 'a/../..' is not a folder name of letters, digits and . _ + -",
    # no key=value
    "coarse.epochs": "coarse.epochs: expected key=value, for example coarse.epochs=30",
    "=3": "=3: expected key=value, for example coarse.epochs=30",
}


@pytest.mark.parametrize("override", BAD_OVERRIDES)
def test_bad_override_gets_its_message(override):
    assert message(override) == BAD_OVERRIDES[override]


def test_settings_that_do_not_go_together_name_both():
    assert message("model.pretrained=true", "model.width=16") == (
        "model.width: 16 does not go with model.pretrained=true, whose width is 64"
    )
    assert message("filter.n_views=1", "filter.score=variation_ratio") == (
        "filter.n_views: 1 is too few for filter.score=variation_ratio; use 2 or more"
    )


@pytest.mark.parametrize(
    ("content", "part"),
    [
        ("seed: 1\nseed: 2\n", "found duplicate key seed"),
        ("coarse:\n  epochs: 3\n  epochs: 4\n", "found duplicate key epochs"),
        ("- seed\n", "must hold `key: value` lines"),
        ("3\n", "Invalid loaded object type"),
        ("{coarse: [}", "did not find expected node content"),
        ("coarse:\n\tepochs: 1", "found character that cannot start any token"),
        ("a: !!python/object:os.system {}", "could not determine a constructor for the tag"),
        (b"\xff\xfe\x00a", "invalid start byte"),
    ],
)
def test_bad_yaml_names_the_file(yaml_file, content, part):
    path = yaml_file(content)
    said = message(path=path)
    assert said.startswith(f"{path}: ") and part in said and "\n" not in said


def test_bad_keys_in_a_yaml_are_named_dotted(yaml_file):
    assert message(path=yaml_file("coarse: {epoch: 3}")) == BAD_OVERRIDES["coarse.epoch=3"]
    assert message(path=yaml_file("data:\n")) == "data: expected `name: value` entries, not None"
    assert message(path=yaml_file("data: {coarse_map: {1: [2]}}")) == (
        "data.coarse_map.1: Key 1 (int) is incompatible with (str)"
    )


def test_a_missing_file_is_named(tmp_path):
    for path in (tmp_path / "none.yaml", tmp_path):
        assert message(path=path) == f"{path}: no such config file; configs/ has one for each data set"


def test_a_mistake_is_one_line_and_exit_2_in_a_shell():
    for argv, said in [
        (["coarse.epoch=3"], "error: coarse.epoch: no such setting. Did you mean: 'coarse.epochs'?\n"),
        (["--forse"], "error: unrecognized arguments: --forse; --help shows what there is\n"),
        (["--config"], "error: argument --config: expected one argument; --help shows what there is\n"),
    ]:
        done = subprocess.run([sys.executable, "train_coarse.py", *argv], cwd=ROOT, capture_output=True, text=True)
        assert (done.returncode, done.stdout, done.stderr) == (2, "", said)


@pytest.mark.parametrize(
    "argv", ["seed=3 {c} coarse.epochs=5", "{c} seed=3 coarse.epochs=5", "seed=3 coarse.epochs=5 {c}"]
)
def test_settings_stand_on_either_side_of_config(yaml_file, argv):
    path = yaml_file("coarse: {epochs: 7, lr: 0.5}")
    cfg = parse_config("doc", argv.format(c=f"--config {path}").split())
    assert (cfg.seed, cfg.coarse.epochs, cfg.coarse.lr) == (3, 5, 0.5)
    assert cfg.overrides == ("seed=3", "coarse.epochs=5") and cfg.name == "mine" and not cfg.force


def test_the_command_for_another_script_keeps_the_settings_that_were_given(yaml_file):
    path = yaml_file("coarse: {epochs: 7}")
    cfg = parse_config("doc", ["--config", str(path), "seed=3", "seeds=[0,1]", "coarse.match=finetune/x"])
    start = f"--config {path} seed=3 'seeds=[0,1]'"

    def command(script, **settings):
        python, rest = cfg.command(script, **settings).split(" ", 1)
        assert python == interpreter()
        return rest

    assert command("report.py") == f"report.py {start} coarse.match=finetune/x"
    assert command("train_coarse.py", **{"coarse.match": ""}) == f"train_coarse.py {start}"
    learn = {"coarse.match": "", "multihead.alpha": "0.1"}
    assert command("multihead.py", **learn) == f"multihead.py {start} multihead.alpha=0.1"
    assert command("multihead.py", **learn | {"multihead.alpha": "0.9"}) == f"multihead.py {start}"


def test_a_named_command_starts_with_what_runs_here(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "executable", str(tmp_path / ".venv/bin/python"))
    assert interpreter() == "python"
    monkeypatch.chdir(tmp_path)
    assert interpreter() == ".venv/bin/python"


def test_defaults_are_valid_and_every_key_is_in_the_help():
    cfg = load_config()
    assert cfg.name == "digits" and str(cfg.run_dir) == "runs/digits/seed0"
    assert cfg == dataclasses.replace(Config(), name="digits", cluster=ClusterConfig(source="umap_hdbscan"))
    listed = re.findall(r"^  ([\w.]+)=", config.settings_help(), re.MULTILINE)
    assert listed == list(flatten(dataclasses.asdict(Config())))


def test_labels_go_to_a_folder_named_for_the_method_unless_it_is_named():
    assert load_config().cluster.source == "umap_hdbscan"
    assert load_config("", ("cluster.method=oracle",)).cluster.source == "oracle"
    assert load_config("", ("cluster.source=mine", "cluster.method=oracle")).cluster.source == "mine"


def test_a_coarse_map_replaces_the_one_before_it(yaml_file):
    path = yaml_file("data: {coarse_map: {a: [x], b: [y]}}")
    assert load_config(str(path)).data.coarse_map == {"a": ["x"], "b": ["y"]}
    assert load_config(str(path), ("data.coarse_map={c: [z]}",)).data.coarse_map == {"c": ["z"]}


def test_an_interruption_is_one_line_and_exit_130(capsys):
    for error, said in [
        (KeyboardInterrupt(), "interrupted; run the same command to go on\n"),
        (KeyboardInterrupt("step 3 is saved"), "interrupted: step 3 is saved; run the same command to go on\n"),
    ]:

        def main(argv=None, error=error):
            raise error

        with pytest.raises(SystemExit) as stop:
            command_line(main)()
        assert stop.value.code == 130 and capsys.readouterr().err == said


def test_an_operating_system_error_is_one_line_but_a_bug_keeps_its_traceback(capsys):
    with pytest.raises(SystemExit) as stop:
        command_line(lambda argv: open("/nowhere/file"))()
    assert stop.value.code == 2 and capsys.readouterr().err == "error: /nowhere/file: No such file or directory\n"
    with pytest.raises(ZeroDivisionError):
        command_line(lambda argv: 1 / 0)()


def test_help_imports_nothing_heavy():
    """In one process for all scripts; each is imported and asked for --help as from the shell."""
    scripts = [f"{name}.py" for name in (*STAGE_SCRIPTS, "reproduce", "report")]
    program = f"""
import contextlib, io, runpy, sys
for script in {scripts}:
    sys.argv, out = [script, "--help"], io.StringIO()
    with contextlib.redirect_stdout(out):
        try:
            runpy.run_path(script, run_name="__main__")
        except SystemExit as stop:
            assert stop.code == 0, stop
    assert "usage   python" in out.getvalue() and "coarse.epochs=60" in out.getvalue(), script
    heavy = [name for name in {HEAVY} if name in sys.modules]
    assert not heavy, (script, heavy)
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def config_fields() -> list[tuple[str, int, int]]:
    """(Class.field, first line, last line) of every setting in utils/config.py."""
    tree = ast.parse((ROOT / "utils/config.py").read_text())
    return [
        (f"{cls.name}.{node.target.id}", node.lineno, node.end_lineno)
        for cls in tree.body
        if isinstance(cls, ast.ClassDef)
        for node in cls.body
        if isinstance(node, ast.AnnAssign) and "ClassVar" not in ast.unparse(node.annotation)
    ]


def test_every_setting_has_a_comment():
    source = (ROOT / "utils/config.py").read_text()
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    commented = {token.start[0] for token in tokens if token.type == tokenize.COMMENT}
    # A group of settings is explained by its own fields.
    fields = [f for f in config_fields() if not (f[0].startswith("Config.") and f[0].split(".")[1] in GROUPS)]
    assert len(fields) > 70
    assert not [name for name, first, last in fields if not commented & set(range(first, last + 1))]


def test_every_setting_is_used_by_the_program():
    """A setting that nothing reads would be a promise the program does not keep."""
    lines = [line for folder in (ROOT, ROOT / "utils") for path in folder.glob("*.py") for line in path.open()]
    program = "".join(line for line in lines if "check_" not in line)
    unread = [name for name, _, _ in config_fields() if not re.search(rf"\.{name.split('.')[1]}\b", program)]
    assert not unread
