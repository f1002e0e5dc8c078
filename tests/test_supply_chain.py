"""What may be installed beside this package, and what its own code may call."""

import ast
import tomllib
from importlib.metadata import version
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

ROOT = Path(__file__).parents[1]
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


@pytest.fixture(scope="module")
def calls():
    """Every call in the package: where it is, what is called, and the text of its keyword arguments."""
    found = []
    for file in sorted((ROOT / "qlora_lightning").rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call):
                given = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
                found.append((f"{file.relative_to(ROOT)}:{node.lineno}", ast.unparse(node.func), given))
    return found


@pytest.mark.parametrize(
    ("names", "keyword", "value"),
    [(("torch.load",), "weights_only", "True"), (("np.load", "numpy.load"), "allow_pickle", "False")],
)
def test_files_are_read_without_running_code(calls, names, keyword, value):
    loads = [(place, given.get(keyword)) for place, name, given in calls if name in names]
    assert loads
    assert [place for place, found in loads if found != value] == []


def test_no_code_of_a_base_may_run_unless_the_user_says_so(calls):
    assert [place for place, _, given in calls if given.get("trust_remote_code") == "True"] == []


def test_nothing_is_read_or_run_by_means_that_run_code(calls):
    forbidden = {"eval", "exec", "yaml.load", "yaml.unsafe_load", "yaml.full_load", "os.system", "pickle.load"}
    forbidden |= {"pickle.loads", "dill.load", "joblib.load", "marshal.loads"}
    assert [place for place, name, _ in calls if name in forbidden] == []
    assert [place for place, _, given in calls if given.get("shell") not in (None, "False")] == []
