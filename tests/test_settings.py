"""What a user sets: YAML files as people write them, types, paths, and one value for each key."""

import importlib
import os
import re
from pathlib import Path

import pytest

from quadmamba.configs import ConfigError, Parser, load_cfg, path_argument
from quadmamba.configs.load import get_key
from quadmamba.main import main


def load(tmp_path, text, **more):
    path = tmp_path / "a.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return load_cfg(path, **more)


def refused(tmp_path, text):
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, text)
    return str(caught.value)


TWICE = {
    "section": ("TRAIN: {SEED: 1}\nTAG: a\nTRAIN: {EPOCHS: 5}\n", "TRAIN: given twice", (1, 3)),
    "empty section": ("TRAIN:\nTAG: a\nTRAIN: {EPOCHS: 5}\n", "TRAIN: given twice", (1, 3)),
    "key": ("TRAIN:\n  SEED: 1\n  EPOCHS: 5\n  SEED: 1\n", "TRAIN.SEED: given twice", (2, 4)),
    "top": ("TAG: a\n\nTAG: b\n", "TAG: given twice", (1, 3)),
    "flow": ("TRAIN: {SEED: 1,\n SEED: 2}\n", "TRAIN.SEED: given twice", (1, 2)),
    "quoted": ("TRAIN: {SEED: 1}\n'TRAIN': {EPOCHS: 2}\n", "TRAIN: given twice", (1, 2)),
    "dotted": ("TRAIN: {SEED: 7}\nTRAIN.SEED: 9\n", "TRAIN.SEED: given twice", (1, 2)),
    "dotted first": ("TRAIN.SEED: 7\r\nTRAIN:\r\n  SEED: 9\r\n", "TRAIN.SEED: given twice", (1, 3)),
}


@pytest.mark.parametrize(("text", "message", "lines"), TWICE.values(), ids=TWICE)
def test_W3_a_key_given_twice_in_a_file_is_named_with_its_lines(tmp_path, text, message, lines):
    got = refused(tmp_path, text)
    assert got.startswith(message)
    assert "line {} and line {}".format(*lines) in got


def test_W3_a_key_twice_in_one_line_of_a_file(tmp_path):
    assert "given twice in" in refused(tmp_path, "TRAIN: {SEED: 1, SEED: 2}")


def test_W3_a_dotted_key_beside_other_keys_of_its_section_counts(tmp_path):
    cfg = load(tmp_path, "TRAIN: {SEED: 7}\nTRAIN.EPOCHS: 40\nDATA:\n")
    assert (cfg.TRAIN.SEED, cfg.TRAIN.EPOCHS, cfg.DATA.IMG_SIZE) == (7, 40, 224)


COMMANDS = {
    "opts": ["--opts", "TRAIN.SEED", "1", "TRAIN.SEED", "2"],
    "opts twice": ["--opts", "TRAIN.SEED", "1", "--opts", "TRAIN.SEED", "2"],
    "flag and opts": ["--seed", "1", "--opts", "TRAIN.SEED", "2"],
    "opts and flag": ["--opts", "TRAIN.SEED", "1", "--seed", "2"],
    "mode": ["--opts", "MODE", "train"],
    "text": ["--tag", "a", "--opts", "TAG", "b"],
}


@pytest.mark.parametrize("words", COMMANDS.values(), ids=COMMANDS)
def test_W3_two_values_for_a_key_on_the_command_line_end_with_2(words, capsys):
    assert main(["--cfg", "configs/quadmamba_lite.yaml", "--info", *words]) == 2
    err = capsys.readouterr().err
    assert re.match(r"error: (TRAIN.SEED|MODE|TAG): expected one value, got .* and ", err), err


@pytest.mark.parametrize("flag", ["--seed", "--epochs", "--cfg"])
def test_W3_a_flag_given_twice_ends_with_2(flag, capsys):
    with pytest.raises(SystemExit) as stopped:
        main([flag, "1", "--info", flag, "2"])
    assert stopped.value.code == 2
    assert f"{flag}: expected one value, got 1 and 2" in capsys.readouterr().err


def test_W3_one_value_given_twice_on_the_command_line_is_no_contradiction():
    words = ["TRAIN.BASE_LR", "1e-3", "TRAIN.BASE_LR", "0.001", "TRAIN.SEED", "5"]
    cfg = load_cfg(flags={"TRAIN.SEED": 5}, opts=words)
    assert (cfg.TRAIN.BASE_LR, cfg.TRAIN.SEED) == (1e-3, 5)


TAKEN = {
    "off is a text for a text": ("TRAIN.AMP", "off", "off"),
    "no": ("TAG", "no", "no"),
    "digits": ("TAG", "007", "007"),
    "float like": ("TAG", "1e-3", "1e-3"),
    "date": ("TAG", "2024-01-01", "2024-01-01"),
    "time": ("TAG", "1:30", "1:30"),
    "true": ("TAG", "True", "True"),
    "quotes": ("TAG", "'a b'", "a b"),
    "null": ("TRAIN.RESUME", "null", ""),
    "yes": ("TRAIN.EMA", "yes", True),
    "switched off": ("MODEL.SHIFT", "off", False),
    "exponent": ("TRAIN.BASE_LR", "1e-3", 1e-3),
    "whole for float": ("TRAIN.BASE_LR", "1", 1.0),
    "thousands": ("TRAIN.EPOCHS", "1_000", 1000),
    "list": ("AUG.SCALE", "[1e-1, 1]", [0.1, 1.0]),
}


@pytest.mark.parametrize(("key", "value", "right"), TAKEN.values(), ids=TAKEN)
def test_W3_a_value_has_the_type_of_its_key_in_a_file_and_on_the_command_line(
    tmp_path, key, value, right
):
    for cfg in (load(tmp_path, f"{key}: {value}"), load_cfg(opts=[key, value])):
        got = get_key(cfg, key)
        assert (got, type(got)) == (right, type(right))


def test_W3_a_text_on_the_command_line_is_no_yaml():
    assert load_cfg(opts=["TAG", "run #1: a"]).TAG == "run #1: a"
    assert load_cfg(opts=["TAG", "*x & {y}"]).TAG == "*x & {y}"


WRONG = {
    "octal": ("TRAIN.EPOCHS", "010", "expected int .* got '010'; leave out the 0 in front"),
    "octal for float": ("TRAIN.BASE_LR", "010", "expected float"),
    "sexagesimal": ("TRAIN.EPOCHS", "1:30", "expected int"),
    "sexagesimal for float": ("RANK_TIMEOUT", "1:30", "expected float"),
    "hexadecimal": ("TRAIN.EPOCHS", "0x10", "expected int"),
    "float for int": ("TRAIN.EPOCHS", "3.0", "expected int"),
    "exponent for int": ("TRAIN.EPOCHS", "1e3", "expected int"),
    "bool for int": ("TRAIN.EPOCHS", "True", "expected int .* got 'True'"),
    "bool for float": ("TRAIN.BASE_LR", "True", "expected float .* got 'True'"),
    "yes for float": ("TRAIN.BASE_LR", "yes", "expected float"),
    "bool in a list": ("MODEL.DIMS", "[True, 8, 8, 8]", r"DIMS\[0\]: expected int"),
    "number for bool": ("TRAIN.EMA", "1", "expected bool"),
    "quoted number": ("TRAIN.EPOCHS", "'5'", r"expected int .* got '5' \(str\)"),
    "null for int": ("TRAIN.EPOCHS", "null", "expected int .* got nothing"),
    "null for bool": ("TRAIN.EMA", "null", "expected bool .* got nothing"),
    "list for int": ("TRAIN.EPOCHS", "[5]", r"expected int .* got \['5'\]"),
    "list for text": ("TAG", "[a]", "expected str"),
    "number for list": ("MODEL.DIMS", "8", "expected list, as .* got '8'"),
    "list of lists": ("MODEL.DIMS", "[[8, 8, 8, 8]]", "expected a value or a plain list"),
    "too large": ("TRAIN.EPOCHS", "1" + "0" * 20, "expected int of at most 9223372036854775807"),
    "far too large": ("TRAIN.EPOCHS", "1" + "0" * 5000, "expected int of at most"),
    "too large for float": ("TRAIN.BASE_LR", "1" + "0" * 400, "expected a finite number"),
    "infinite": ("TRAIN.BASE_LR", ".inf", "expected a finite number"),
    "overflow": ("TRAIN.BASE_LR", "1e400", "expected a finite number"),
    "no number in a list": ("TRAIN.BETAS", "[0.9, .nan]", r"BETAS\[1\]: expected a finite number"),
    "case": ("TRAIN.AMP", "BF16", "expected one of bf16, fp16, off, got 'BF16'"),
    "time": ("RANK_TIMEOUT", "1e9", "RANK_TIMEOUT: expected at most"),
}


@pytest.mark.parametrize(("key", "value", "message"), WRONG.values(), ids=WRONG)
def test_W3_a_value_of_another_type_is_named(tmp_path, key, value, message):
    with pytest.raises(ConfigError, match=message) as caught:
        load_cfg(opts=[key, value])
    for got in (refused(tmp_path, f"{key}: {value}"), str(caught.value)):
        assert re.search(message, got)
        assert key in got
        assert len(got) < 300


@pytest.mark.parametrize("value", [True, "1", None, [1.0], 10**400])
def test_W3_a_python_value_of_another_type_is_named(value):
    with pytest.raises(ConfigError, match="TRAIN.BASE_LR: expected (float|a finite number)"):
        load_cfg(flags={"TRAIN.BASE_LR": value})


FILES = {
    "empty": ("", "expected KEY: value lines in .* got nothing"),
    "comments": ("# TRAIN:\n", "got nothing"),
    "list": ("- TRAIN\n", "got a sequence"),
    "text": ("hello", "got a scalar"),
    "two documents": ("TAG: a\n---\nTAG: b\n", "single document"),
    "tab": ("TRAIN:\n\tSEED: 1\n", "line 2, column 1; indent with spaces"),
    "latin": ("# \u00e9poques\nTAG: a".encode("latin-1"), "expected UTF-8 text, got the byte 0xe9"),
    "utf-16": ("TAG: a".encode("utf-16"), "expected UTF-8 text"),
    "nul": ("TAG: a\0", "not a YAML file"),
    "nested": ("[" * 5000, "not a YAML file"),
    "large": ("#" * (2 << 20), "more than 1048576 bytes"),
    "tag": ("TAG: !!python/name:os.system a", "without a tag in .*, line 1, got !!python"),
    "own tag": ("TRAIN: !mine {SEED: 1}", "without a tag in .*, line 1, got !mine"),
    "binary": ("TAG: !!binary aGk=", "without a tag"),
    "merge": ("DATA: &d {WORKERS: 1}\nAUG:\n  <<: *d\n", "line 3: the merge key <<"),
    "recursive": ("TRAIN: &t\n  SEED: *t\n", "TRAIN.SEED: expected a value"),
    "undefined alias": ("TAG: *x", "not a YAML file"),
    "value for a section": ("TRAIN: 5", "TRAIN: expected a section .* line 1, got '5'"),
    "list for a section": ("TRAIN: [a]", "TRAIN: expected a section"),
    "section for a value": ("TAG: {a: 1}", "TAG: expected a value .* got a section"),
    "empty section for a value": ("TAG: {}", "TAG: expected a value .* got a section"),
    "unknown section": ("TRIAN: {SEED: 1}", "unknown key TRIAN in .*, line 1; did you mean TRAIN?"),
    "lower case": ("train: {seed: 1}", "unknown key train in .*; did you mean TRAIN?"),
    "outside": ("TRAIN:\nEPOCHS: 5\n", "unknown key EPOCHS .* line 2; did you mean TRAIN.EPOCHS?"),
    "number as key": ("1: 2", "unknown key 1 in"),
    "list as key": ("? [a]\n: 1", "expected a name as key in .*, line 1, got a sequence"),
}


@pytest.mark.parametrize(("text", "message"), FILES.values(), ids=FILES)
def test_W3_a_file_that_says_something_else_is_refused(tmp_path, text, message):
    assert re.search(message, refused(tmp_path, text)), refused(tmp_path, text)


def test_W3_files_of_other_systems_and_aliases_of_values_are_read(tmp_path):
    text = "TRAIN:\r\n  SEED: &seed 3\r\n  EPOCHS: *seed\r\n  WARMUP_EPOCHS: 0\r\n"
    cfg = load(tmp_path, b"\xef\xbb\xbf" + text.encode())
    assert (cfg.TRAIN.SEED, cfg.TRAIN.EPOCHS) == (3, 3)


def test_W3_a_folder_and_a_file_that_may_not_be_read(tmp_path):
    with pytest.raises(ConfigError, match="--cfg: expected a YAML file or a name, got the folder"):
        load_cfg(tmp_path)
    if os.geteuid():
        (tmp_path / "a.yaml").write_text("TAG: a")
        (tmp_path / "a.yaml").chmod(0)
        with pytest.raises(ConfigError, match="--cfg: cannot read .*: Permission denied"):
            load_cfg(tmp_path / "a.yaml")


@pytest.fixture
def home(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("STORE", "/store")
    monkeypatch.setenv("NOTHING", "")
    return str(tmp_path / "home")


@pytest.mark.parametrize("key", ["OUTPUT", "DATA.PATH", "TRAIN.PRETRAINED", "TRAIN.RESUME"])
@pytest.mark.parametrize("way", ["yaml", "flag", "opts"])
def test_M7_home_and_variables_are_filled_in_for_every_path(tmp_path, home, key, way):
    cases = {
        "~/a": f"{home}/a",
        "~": home,
        "$STORE/a": "/store/a",
        "${STORE}x": "/storex",
        "~root/a": os.path.expanduser("~root/a"),
        "a$$b~": "a$b~",
    }
    for value, right in cases.items():
        if way == "yaml":
            cfg = load(tmp_path, f"{key}: {value}")
        else:
            cfg = load_cfg(flags={key: value}) if way == "flag" else load_cfg(opts=[key, value])
        assert get_key(cfg, key) == right
        assert Path(right).is_absolute() or value == "a$$b~"


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("$MISSING_/a", "variable MISSING_ in '.MISSING_/a' is not set"),
        ("$NOTHING/a", "variable NOTHING .* is not set, or empty"),
        ("a$/b", "after a dollar sign"),
        ("~nobody_here/a", "no home folder of ~nobody_here"),
        ("", "OUTPUT: expected a folder, got nothing"),
        ("x" * 300, "expected a path of at most 4095 bytes, 255 in each name"),
        ("x/" * 2100, "expected a path of at most 4095 bytes"),
    ],
)
@pytest.mark.usefixtures("home")
def test_M7_a_path_that_cannot_be_is_named(path, message):
    with pytest.raises(ConfigError, match=f"OUTPUT.*{message}|{message}"):
        load_cfg(opts=["OUTPUT", path])


def test_M7_the_configuration_file_is_found_at_home(home):
    Path(home).mkdir()
    (Path(home) / "a.yaml").write_text("TAG: found")
    assert load_cfg("~/a.yaml").TAG == "found"
    assert load_cfg("$HOME/a.yaml").TAG == "found"


@pytest.mark.parametrize("key", ["TAG", "MODEL.NAME"])
@pytest.mark.parametrize("name", ["", " ", "a/b", "/a", "..", ".", "a\nb", "a\0", "x" * 256])
def test_M7_a_name_of_a_run_is_the_name_of_one_folder(key, name):
    with pytest.raises(ConfigError, match=f"{key}: expected the name of a folder"):
        load_cfg(flags={key: name})
    assert get_key(load_cfg(flags={key: "a b..c-1"}), key) == "a b..c-1"


def test_M7_a_name_with_a_dollar_sign_that_exists_is_taken_as_it_stands(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("a$b").mkdir()
    assert load_cfg(flags={"OUTPUT": "a$b"}).OUTPUT == "a$b"
    with pytest.raises(ConfigError, match="variable b in"):
        load_cfg(flags={"OUTPUT": "a$b/c"})


def parsed(words):
    parser = Parser(None)
    parser.add_argument("--output", type=path_argument)
    parser.add_argument("--number", type=int, default=3)
    parser.add_argument("--opts", nargs="+", action="extend", default=[])
    return vars(parser.parse_args(words))


def test_M7_paths_of_the_tools_are_filled_in(home):
    words = ["--output", "~/a", "--number", "3", "--opts", "a", "--opts", "b"]
    assert parsed(words) == {"output": Path(home, "a"), "number": 3, "opts": ["a", "b"]}


@pytest.mark.usefixtures("home")
@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--output", "$MISSING_/a"], "variable MISSING_ in '.MISSING_/a' is not set"),
        (["--number", "3", "--number", "4"], "--number: expected one value, got 3 and 4"),
        (["--out", "a"], "unrecognized arguments: --out a"),
    ],
)
def test_M7_a_command_line_of_a_tool_that_cannot_be_ends_with_2(words, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        parsed(words)
    assert stopped.value.code == 2
    assert re.search(message, capsys.readouterr().err)


TOOLS = {  # each with the words that it needs, and those that are paths
    "ablate": ["order", "--data={}", "--output={}", "--cfg={}"],
    "check_data": ["{}", "--json={}"],
    "import_release": ["{}", "{}", "--export", "--cfg={}"],
    "make_digits": ["{}"],
    "visualize": ["{}", "--cfg={}", "--pretrained={}", "--output={}"],
}


@pytest.mark.usefixtures("home")
@pytest.mark.parametrize(
    ("tool", "place"),
    [(tool, i) for tool, words in TOOLS.items() for i, word in enumerate(words) if "{}" in word],
)
def test_M7_every_path_of_every_tool_may_have_variables(tool, place, capsys):
    words = [w.format("$MISSING_" if i == place else "x") for i, w in enumerate(TOOLS[tool])]
    try:
        code = importlib.import_module(f"quadmamba.tools.{tool}").main(words)
    except SystemExit as stopped:
        code = stopped.code
    assert code == 2
    assert "the environment variable MISSING_" in capsys.readouterr().err
