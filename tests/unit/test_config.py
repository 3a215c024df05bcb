"""Options: layers, types, refusals with the way out, and that nothing heavy is imported for them."""

import subprocess
import sys

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from dist_lars import evaluate, models, optim, pack, train
from dist_lars.cli import load_config, make_parser, parse, preset_names
from dist_lars.config import LEAVES, Config, as_flat, flat_yaml, from_flat, to_yaml
from dist_lars.continuation import differences
from dist_lars.errors import UserError
from dist_lars.plan import make_plan


def config_of(*argv: str) -> Config:
    return parse(list(argv), make_parser("test", ""))[0]


def test_no_arguments_is_resnet18_8k():
    assert config_of() == load_config("resnet18_8k")
    assert config_of().batch_size == 8192


def test_later_layers_win(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text("epochs: 20\noptim: {lr: 3.0}\nschedule.decay: cosine\n")
    c = config_of("--optim.lr", "10", "--preset", "quickstart", "--config", str(file))
    assert (c.epochs, c.optim.lr, c.schedule.decay, c.data.kind) == (20, 10.0, "cosine", "digits")
    assert c.name == "quickstart"
    assert config_of("--config", str(file)).name == "mine"


def test_a_dash_is_accepted_for_an_underscore():
    assert config_of("--batch-size=512", "--schedule.warmup-epochs", "2").batch_size == 512


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--epoch", "3"], "unknown option 'epoch'; did you mean epochs"),
        (["--optim.learning_rate", "3"], "unknown option 'optim.learning_rate'; did you mean .*optim.lr"),
        (["--preset", "quikstart"], "unknown preset 'quikstart'; did you mean 'quickstart'"),
        (["--epochs", "2.5"], "epochs is '2.5', but it must be a whole number"),
        (["--optim.lr", "high"], "optim.lr is 'high', but it must be a number"),
        (["--data.flip", "maybe"], "data.flip is 'maybe', but it must be true or false"),
        (["--schedule.decay", "pol"], "schedule.decay is 'pol', but it must be one of poly, cosine, step, constant"),
        (["--schedule.milestones", "[a]"], "must be a list such as"),
        (["--optim.name", "sdg"], "optim.name is 'sdg', but it must be one of lars, lamb, sgd"),
        (["--epochs"], "expected one argument"),
        (["--preset"], "--preset needs a value"),
        (["epochs=3"], "epochs=3"),
        (["--config", "/no/such.yaml"], "--config /no/such.yaml: No such file"),
        (["--batch_size", "0"], "batch_size is 0, but it must be at least 1"),
        (["--optim.lr", "-1"], "optim.lr is -1.0, but it must be above zero"),
        (["--optim.momentum", "1"], r"optim.momentum is 1.0, but it must be in \[0, 1\)"),
        (["--optim.weight_decay", ".inf"], "optim.weight_decay"),
        (["--data.min_scale", "0"], "data.min_scale is 0.0, but it is a share"),
        (["--data.resize", "100"], "data.resize 100 is smaller than data.image_size 224.*--data.resize 256"),
        (["--schedule.warmup_epochs", "100"], "longer than epochs 90"),
        (["--schedule.gamma", "-1"], "schedule.gamma is -1.0, but it is the factor of a drop"),
        (["--schedule.milestones", "[-5, 30]"], "schedule.milestones is -5.0, but it must be epochs from 0 on"),
        (["--seed", str(2**64)], r"seed is 18446744073709551616, but it must be below 2\^63"),
        (["--max_time", "soon"], "max_time is 'soon', but it must be a duration such as 01:55:00"),
    ],
)
def test_wrong_values_are_refused_with_value_rule_and_way_out(argv, message):
    with pytest.raises(UserError, match=message):
        config_of(*argv)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("optim: {learning: 3}", "mine.yaml: unknown option 'optim.learning'"),
        ("- 3", "expected `key: value` lines, found list"),
        ("a: [", "is not valid YAML"),
        ("epochs: many", "epochs is 'many', but it must be a whole number"),
    ],
)
def test_wrong_files_are_refused(tmp_path, text, message):
    file = tmp_path / "mine.yaml"
    file.write_text(text)
    with pytest.raises(UserError, match=message):
        config_of("--config", str(file))


def test_numbers_as_yaml_misreads_them():
    assert load_config(overrides={"schedule.start_lr": "1e-3"}).schedule.start_lr == 1e-3  # YAML 1.1 reads a string
    assert config_of("--data.path", "2012").data.path == "2012"  # and here a number


@given(
    st.fixed_dictionaries(
        {
            "epochs": st.integers(6, 10**6),
            "optim.lr": st.none() | st.floats(1e-6, 1e3),
            "data.path": st.none() | st.text("abcäöü ./_-01[]{}:'\"#", min_size=1).filter(str.strip),
            "schedule.milestones": st.lists(st.floats(0, 100), max_size=4).map(tuple),
            "data.flip": st.booleans(),
            "resume.from": st.sampled_from(["auto", "never", "runs/a b/x.pt"]),
        }
    )
)
def test_rendering_and_reading_give_the_same_config(flat):
    config = from_flat(flat)
    again = from_flat({k: tuple(v) if isinstance(v, list) else v for k, v in flat_yaml(to_yaml(config), "").items()})
    assert again == config
    assert from_flat(as_flat(config)) == config


def test_python_overrides_are_typed_like_the_command_line():
    assert load_config("quickstart", overrides={"epochs": 3, "schedule.milestones": (1, 2)}).epochs == 3
    with pytest.raises(UserError, match="must be a whole number"):
        load_config(overrides={"epochs": 2.5})
    with pytest.raises(UserError, match="did you mean epochs"):
        load_config(overrides={"epoch": 2})


def test_differences_name_what_matters_for_a_resume():
    a, b = load_config("quickstart"), load_config("quickstart", overrides={"epochs": 9, "log.every_steps": 3})
    assert differences(as_flat(a), as_flat(b)) == ["epochs: 12 -> 9"]


@pytest.mark.parametrize("name", preset_names())
def test_every_preset_loads_and_plans(name):
    config = load_config(name)
    assert config.name == name
    assert make_plan(config, 1, config.data.train_images, config.data.val_images).total_steps > 0


def test_choices_are_the_ones_that_exist():
    assert set(LEAVES["model.name"].type.__args__) == set(models.NAMES)
    assert set(LEAVES["optim.name"].type.__args__) == set(optim.NAMES)
    assert set(LEAVES["optim.law"].type.__args__) == set(optim.LAWS)


@pytest.mark.parametrize("module", [train, evaluate, pack])
def test_help_shows_the_description_line_by_line(module, capsys):
    with pytest.raises(SystemExit):
        module.main(["--help"])
    shown = capsys.readouterr().out
    assert all(line in shown for line in module.__doc__.splitlines())


def test_every_option_is_documented():
    assert all(len(leaf.help) > 10 for leaf in LEAVES.values())


def run_python(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout


def test_planning_imports_neither_torch_nor_horovod():
    out = run_python(
        "import sys; from dist_lars.train import main; main(['--dry-run', '--world_size', '64', '--json']);"
        "print([m for m in ('torch', 'horovod', 'mpi4py', 'PIL') if m in sys.modules])"
    )
    *plan, heavy = out.strip().splitlines()
    assert heavy == "[]"
    assert yaml.safe_load("\n".join(plan))["steps_per_epoch"] == 156


def test_a_run_of_before_an_option_existed_goes_on_with_its_default():
    now = as_flat(Config())
    before = {k: v for k, v in now.items() if k != "comm.wire"}
    assert differences(before, now) == []
    assert differences(before, {**now, "comm.wire": "bf16"}) == ["comm.wire: fp32 -> bf16"]


def test_the_backend_and_its_knobs_may_change_between_two_starts():
    other = {"comm.backend": "torch", "comm.bucket_mb": 5.0, "comm.cycle_ms": 3.0, "comm.hierarchical": True}
    assert differences(as_flat(Config()), as_flat(Config()) | other) == []
