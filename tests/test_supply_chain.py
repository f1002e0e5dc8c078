"""What may be installed beside this package, and what its own code may call."""

import ast
import tomllib
from importlib.metadata import version
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[1]
COMPROMISED = [("lightning", "2.6.2"), ("lightning", "2.6.3")]  # advisory GHSA-w37p-236h-pfx3


@pytest.mark.parametrize(("name", "release"), COMPROMISED)
def test_compromised_releases_are_excluded_and_not_installed(name, release):
    lines = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    (found,) = [each for each in map(Requirement, lines) if each.name == name]
    assert not found.specifier.contains(release, prereleases=True)
    assert version(name) != release


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


def test_nothing_is_read_or_run_by_means_that_run_code(calls):
    forbidden = {"eval", "exec", "yaml.load", "yaml.unsafe_load", "yaml.full_load", "os.system", "pickle.load"}
    forbidden |= {"pickle.loads", "dill.load", "joblib.load", "marshal.loads"}
    assert [place for place, name, _ in calls if name in forbidden] == []
    assert [place for place, _, given in calls if given.get("trust_remote_code") == "True"] == []
    assert [place for place, _, given in calls if given.get("shell") not in (None, "False")] == []
