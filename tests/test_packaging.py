# SPDX-License-Identifier: Apache-2.0
"""What is shipped, and that what is shipped is found."""

import hashlib
import importlib.util
import json
import re
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest

import cupy_msda

ROOT = Path(__file__).parents[1]
IGNORED = {"__pycache__", ".mypy_cache", ".ruff_cache", ".pytest_cache"}


def run(*command, cwd):
    finished = subprocess.run(
        list(map(str, command)), cwd=cwd, capture_output=True, text=True, check=False, timeout=300
    )
    assert finished.returncode == 0, finished.stdout + finished.stderr
    return finished.stdout


def files_under(folder: str, *patterns: str) -> set[str]:
    """Paths relative to the root, as an archive names them."""
    found = (file for pattern in patterns or ("*",) for file in (ROOT / folder).rglob(pattern))
    return {
        file.relative_to(ROOT).as_posix()
        for file in found
        if file.is_file() and not IGNORED & set(file.parts) and file.suffix not in (".pyc", ".pyo")
    }


@pytest.fixture(scope="module")
def archives(tmp_path_factory):
    """The source distribution, and the wheel that is built from it, not from the checkout."""
    folder = tmp_path_factory.mktemp("dist")
    source = tmp_path_factory.mktemp("source") / "checkout"
    copy_checkout(source)
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", folder, cwd=source)
    (wheel,), (sdist,) = folder.glob("*.whl"), folder.glob("*.tar.gz")
    return wheel, sdist


def copy_checkout(target: Path) -> None:
    """What a build reads, without this checkout's build leftovers."""
    folders = ("benchmarks", "cupy_msda", "docs", "examples", "kernels", "scripts", "tests")
    top = {file.name for file in ROOT.iterdir() if file.is_file()}
    for name in top.union(*(files_under(folder) for folder in folders)):
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        (target / name).write_bytes((ROOT / name).read_bytes())


def package_files() -> set[str]:
    return files_under("cupy_msda") | files_under("kernels", "*.cu", "*.cuh")


def test_wheel_holds_the_package_the_kernels_and_nothing_else(archives):
    names = set(zipfile.ZipFile(archives[0]).namelist())
    shipped = {name for name in names if ".dist-info/" not in name}
    expected = {
        name.replace("kernels/", "cupy_msda/kernels/", 1) if name.startswith("kernels/") else name
        for name in package_files()
    }
    assert shipped == expected
    assert {
        "cupy_msda/kernels/forward.cu",
        "cupy_msda/data/coffee.jpg",
        "cupy_msda/py.typed",
    } <= shipped


def test_sdist_holds_all_that_builds_tests_and_documents(archives):
    with tarfile.open(archives[1]) as archive:
        members = [
            member.name.partition("/")[2] for member in archive.getmembers() if member.isfile()
        ]
    shipped = {name for name in members if "egg-info" not in name} - {"PKG-INFO", "setup.cfg"}
    documents = {
        ".clang-format", "CHANGELOG.md", "CITATION.cff", "CONTRIBUTING.md", "LICENSE", "MANIFEST.in",
        "README.md", "SECURITY.md", "constraints.txt", "mkdocs.yml", "pyproject.toml",
    }  # fmt: skip
    folders = ("benchmarks", "cupy_msda", "docs", "examples", "kernels", "scripts", "tests")
    assert shipped == documents.union(*(files_under(folder) for folder in folders))


DOCUMENTS = (
    "README.md", "CONTRIBUTING.md", "CHANGELOG.md", "benchmarks/README.md", "docs/models.md",
    "docs/numerics.md", "docs/performance.md", "docs/support.md", "docs/switching.md",
    "docs/troubleshooting.md", "kernels/README.md",
)  # fmt: skip


def anchors(document: Path) -> set[str]:
    """Of the headings, as GitHub and GitLab make them."""
    headings = re.findall(r"^#+ (.*)$", document.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("document", DOCUMENTS)
def test_links_lead_to_what_is_shipped(document):
    """Relative links, so that they also work in an unpacked source distribution."""
    file = ROOT / document
    text = file.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if not target.startswith("https://"):
            path, _, anchor = target.partition("#")
            linked = (file.parent / path).resolve() if path else file
            assert linked.is_file(), target
            assert not anchor or anchor in anchors(linked), target


def test_the_citation_names_this_version():
    text = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert f"\nversion: {cupy_msda.__version__}\n" in text


def test_metadata(archives):
    archive = zipfile.ZipFile(archives[0])
    (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
    metadata = archive.read(name).decode()
    required = [line for line in metadata.splitlines() if line.startswith("Requires-Dist:")]
    always = sorted(
        line.split()[1].partition(">")[0] for line in required if "extra ==" not in line
    )
    extras = {
        line.split()[1] for line in metadata.splitlines() if line.startswith("Provides-Extra:")
    }
    assert always == ["array-api-compat", "numpy"]
    assert extras == {"cuda12x", "cuda13x", "torch", "cpu", "plot", "dev"}
    assert "\nName: cupy-msda\n" in metadata
    assert "\nLicense-Expression: Apache-2.0 AND CC0-1.0\n" in metadata


def test_the_archives_pass_the_checks_of_the_registry(archives):
    pytest.importorskip("twine", reason="checks with twine")
    run(sys.executable, "-m", "twine", "check", "--strict", *archives, cwd=archives[0].parent)


def test_licence_texts_are_in_both_archives(archives):
    licences = [(ROOT / name).read_bytes() for name in ("LICENSE", "cupy_msda/data/README.txt")]
    with zipfile.ZipFile(archives[0]) as wheel:
        names = [name for name in wheel.namelist() if "dist-info/licenses/" in name]
        assert sorted(map(wheel.read, names)) == sorted(licences)
    with tarfile.open(archives[1]) as sdist:
        (member,) = (
            one
            for one in sdist.getmembers()
            if one.name.count("/") == 1 and one.name.endswith("/LICENSE")
        )
        assert sdist.extractfile(member).read() == licences[0]
    assert b"CC0 1.0" in licences[1]


SOURCES = ("*.py", "*.cu", "*.cuh", "*.cpp", "*.hpp", "*.toml", "*.yml", "*.cff", "scripts/*")


def test_every_source_names_its_licence():
    """In one of its first two lines."""
    tops = [
        ROOT / "scripts",
        *(ROOT / name for name in ("cupy_msda", "kernels", "tests", "examples")),
    ]
    found = {file for top in tops for pattern in SOURCES[:-1] for file in top.rglob(pattern)}
    found |= {file for pattern in SOURCES for file in ROOT.glob(pattern)}
    texts = {file: file.read_text(encoding="utf-8") for file in found if file.is_file()}
    without = [
        file.relative_to(ROOT)
        for file, text in texts.items()
        if text and "SPDX-License-Identifier: Apache-2.0" not in "".join(text.splitlines()[:2])
    ]
    assert len(texts) > 200
    assert not without


def test_the_bill_of_materials_is_what_the_wheel_holds_and_requires(archives):
    command = sys.executable, ROOT / "scripts" / "sbom", archives[0]
    text = run(*command, cwd=archives[0].parent)
    assert run(*command, cwd=archives[0].parent) == text
    bill = json.loads(text)
    package = bill["metadata"]["component"]
    assert (package["name"], package["version"]) == ("cupy-msda", cupy_msda.__version__)
    files = {item["name"]: item for item in bill["components"] if item["type"] == "file"}
    with zipfile.ZipFile(archives[0]) as wheel:
        assert files.keys() == set(wheel.namelist())
        for name, item in files.items():
            assert item["hashes"][0]["content"] == hashlib.sha256(wheel.read(name)).hexdigest()
    licences = {name: item["licenses"][0]["license"]["id"] for name, item in files.items()}
    others = {name: licence for name, licence in licences.items() if licence != "Apache-2.0"}
    assert others == {"cupy_msda/data/coffee.jpg": "CC0-1.0"}
    scopes = {
        item["name"]: item["scope"] for item in bill["components"] if item["type"] == "library"
    }
    required = {name for name, scope in scopes.items() if scope == "required"}
    assert required == {"array-api-compat", "numpy"}
    assert {"torch", "numba", "cupy-cuda12x", "nvidia-cuda-nvrtc"} <= scopes.keys()
    assert not {"pytest", "twine"} & scopes.keys()


def test_the_version_stands_in_one_place():
    """Other files take it from there, or are compared with it above."""
    pyproject = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert 'dynamic = ["version"]' in pyproject
    version = re.compile(rf"(?<![\d.]){re.escape(cupy_msda.__version__)}(?![\d.])")
    files = [ROOT / "pyproject.toml", ROOT / "mkdocs.yml", *(ROOT / "cupy_msda").rglob("*.py")]
    found = [file.name for file in files if version.search(file.read_text(encoding="utf-8"))]
    assert found == ["__init__.py"]


# Asked from a folder that holds neither package nor kernels. Without `site`, so that no installation of this project in
# the environment that runs the tests answers instead; its other packages are added as a plain folder.
FIND = """
import site, sys
site.addsitedir(sys.argv[1])
sys.path.append(sys.argv[2])
import cupy_msda
from cupy_msda.cuda.compile import assemble, kernel_dir
print(cupy_msda.__file__)
print(kernel_dir())
assert "__global__" in assemble("forward.cu")
"""


def found_in(target: Path, cwd: Path) -> tuple[Path, Path]:
    """The folders of the package and of its kernels, as a process in `cwd` finds them."""
    others = sysconfig.get_path("purelib")
    package, kernels = run(
        sys.executable, "-I", "-S", "-c", FIND, target, others, cwd=cwd
    ).splitlines()
    return Path(package).parent, Path(kernels)


def install(target: Path, *what: object) -> None:
    options = ("--quiet", "--no-deps", "--no-index", "--no-build-isolation", "--target", target)
    run(sys.executable, "-m", "pip", "install", *options, *what, cwd=target.parent)


def test_installed_wheel_finds_its_kernels(archives, tmp_path):
    target = tmp_path / "site"
    install(target, archives[0])
    assert found_in(target, tmp_path) == (target / "cupy_msda", target / "cupy_msda" / "kernels")


def test_editable_install_finds_the_kernels_of_the_checkout(tmp_path):
    checkout, target = tmp_path / "checkout", tmp_path / "site"
    copy_checkout(checkout)
    install(target, "--editable", checkout)
    assert found_in(target, tmp_path) == (checkout / "cupy_msda", checkout / "kernels")


# A wheel on sys.path is imported from the zip file that it is, without being unpacked.
IN_A_ZIP = """
import site, sys
sys.path.insert(0, sys.argv[1])
site.addsitedir(sys.argv[2])
import numpy as np
import cupy_msda
from cupy_msda import __main__, ms_deform_attn, ms_deform_attn_backward
from cupy_msda.cpu import backend
from cupy_msda.cuda.compile import assemble, kernel_dir
assert cupy_msda.__file__.startswith(sys.argv[1]), cupy_msda.__file__
for file in kernel_dir().iterdir():
    if file.name.endswith(".cu"):
        assert "__global__" in assemble(file.name)
value, locations = np.ones((1, 4, 1, 2), np.float32), np.full((1, 1, 1, 1, 1, 2), 0.5, np.float32)
arguments = value, [(2, 2)], None, locations, np.ones((1, 1, 1, 1, 1), np.float32)
output = ms_deform_attn(*arguments)
assert (output == 1).all()
ms_deform_attn_backward(output, *arguments)
print(backend.backend().__name__)
sys.exit(__main__.main(sys.argv[3:]))
"""


def test_the_package_runs_from_a_zip_file(archives, tmp_path):
    """Kernel sources, the Numba kernels without a cache folder of their own, and the report."""
    others = sysconfig.get_path("purelib")
    said = run(sys.executable, "-I", "-S", "-c", IN_A_ZIP, archives[0], others, cwd=tmp_path)
    assert f"in {archives[0]}" in said
    assert re.search(r"kernel sources +\S+kernels/? \(16 files\)", said)
    if importlib.util.find_spec("numba"):
        assert said.startswith("cupy_msda.cpu.kernels\n")
    assert "self-check       NumPy arrays: ok" in said


def test_a_zipped_checkout_finds_its_kernels(tmp_path):
    archive = tmp_path / "checkout.zip"
    with zipfile.ZipFile(archive, "w") as file:
        for name in package_files():
            file.write(ROOT / name, name)
    assert found_in(archive, tmp_path) == (archive / "cupy_msda", archive / "kernels")


PICTURE_IN_A_ZIP = """
import site, sys
sys.path.insert(0, sys.argv[1])
site.addsitedir(sys.argv[2])
from cupy_msda import demo
assert demo.__file__.startswith(sys.argv[1]), demo.__file__
print(*demo.load_picture(demo.PICTURE).shape)
"""


def test_the_demo_finds_its_picture_in_a_zip_file(archives, tmp_path):
    for module in ("torch", "matplotlib", "PIL"):
        pytest.importorskip(module)
    others = sysconfig.get_path("purelib")
    command = (sys.executable, "-I", "-S", "-c", PICTURE_IN_A_ZIP, archives[0], others)
    height, width, channels = map(int, run(*command, cwd=tmp_path).split())
    assert min(height, width) > 100
    assert channels == 3
