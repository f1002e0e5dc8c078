"""What may be installed beside this package, and what its own code may call."""

import ast
import tomllib
from importlib.metadata import version
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

ROOT = Path(__file__).parents[1]
SOURCES = sorted((ROOT / "qlora_lightning").rglob("*.py"))
COMPROMISED = [("lightning", "2.6.2"), ("lightning", "2.6.3")]  # advisory GHSA-w37p-236h-pfx3


def requirements():
    lines = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    return {requirement.name: requirement for requirement in map(Requirement, lines)}


@pytest.mark.parametrize(("name", "release"), COMPROMISED)
def test_compromised_releases_are_excluded_and_not_installed(name, release):
    assert not requirements()[name].specifier.contains(release, prereleases=True)
    assert version(name) != release


def test_every_dependency_has_a_floor_that_the_installed_one_reaches():
    for name, requirement in requirements().items():
        assert any(part.operator == ">=" for part in requirement.specifier), name
        assert requirement.specifier.contains(Version(version(name)), prereleases=True), name


def test_no_dependency_comes_by_an_address():
    assert [name for name, requirement in requirements().items() if requirement.url] == []


def calls():
    for file in SOURCES:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call):
                yield f"{file.relative_to(ROOT)}:{node.lineno}", ast.unparse(node.func), node


def keywords(node):
    return {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}


def test_checkpoints_are_read_without_running_code():
    loads = [(place, keywords(node)) for place, name, node in calls() if name == "torch.load"]
    assert loads
    assert [place for place, given in loads if given.get("weights_only") != "True"] == []


def test_no_code_of_a_base_may_run_unless_the_user_says_so():
    given = [(place, keywords(node).get("trust_remote_code")) for place, _, node in calls()]
    assert [place for place, value in given if value == "True"] == []


def test_nothing_is_read_or_run_by_means_that_run_code():
    forbidden = {"eval", "exec", "yaml.load", "yaml.unsafe_load", "yaml.full_load", "os.system", "pickle.load"}
    forbidden |= {"pickle.loads", "dill.load", "joblib.load", "marshal.loads"}
    assert [place for place, name, _ in calls() if name in forbidden] == []
    assert [place for place, _, node in calls() if keywords(node).get("shell") not in (None, "False")] == []


def test_arrays_are_read_without_pickle():
    loads = [(place, keywords(node)) for place, name, node in calls() if name in ("np.load", "numpy.load")]
    assert [place for place, given in loads if given.get("allow_pickle") != "False"] == []
