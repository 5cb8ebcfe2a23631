# SPDX-License-Identifier: Apache-2.0
"""python -m cupy_msda: the report with its self-check, and the demo."""

import importlib
import io
import json
import os
import random
import re
import stat
import subprocess
import sys
import zlib
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms, features

import cupy_msda
from cupy_msda import __main__, demo, plot, report
from cupy_msda.cpu import backend as cpu
from cupy_msda.cuda import launch, tuned
from cupy_msda.cuda.plans import Choice, Device
from cupy_msda.integrations import deformable_detr
from tests.processes import ROOT, run


def command(
    *arguments, absent=(), warnings="error", **environment
) -> subprocess.CompletedProcess[str]:
    """Run the command line in a process of its own, in which some modules cannot be imported."""
    code = (
        f"import sys, runpy; sys.modules.update(dict.fromkeys({list(absent)})); "
        "runpy.run_module('cupy_msda', run_name='__main__', alter_sys=True)"
    )
    return run(code, "-W", warnings, arguments=arguments, **environment)


def fields(text: str) -> dict[str, str]:
    """The report's lines by label; what is indented belongs to the line before."""
    pairs = re.findall(r"^(\S.{15}) (.*)$", text, re.MULTILINE)
    return {label.strip(): value for label, value in pairs}


@pytest.fixture(scope="module")
def plain_report():
    return command()


def test_report_passes_and_names_versions(plain_report):
    assert plain_report.returncode == 0, plain_report.stdout + plain_report.stderr
    said = fields(plain_report.stdout)
    assert said["cupy-msda"].startswith(cupy_msda.__version__)
    assert said["numpy"] == np.__version__
    assert said["torch"].startswith(torch.__version__)
    assert re.match(r"\d+\.\d+\.\d+ on ", said["python"])
    assert said["kernel sources"].startswith(str(ROOT / "kernels"))
    assert said["CPU arrays"] == "Numba kernels"


def test_report_checks_every_backend_at_hand(plain_report):
    checked = re.findall(r"^self-check +(.*): (\w+)$", plain_report.stdout, re.MULTILINE)
    assert checked[:2] == [("NumPy arrays", "ok"), ("torch on the CPU", "ok")]
    assert len(checked) == 2 + (report.torch_obstacle() is None) + (report.cupy_obstacle() is None)


@pytest.mark.skipif(
    torch.cuda.is_available(), reason="says why CUDA arrays cannot run; here they can"
)
def test_report_says_why_cuda_arrays_cannot_run(plain_report):
    said = fields(plain_report.stdout)
    for kind in ("torch on CUDA", "CuPy arrays"):
        assert re.match(r"cannot run: .+: (pip )?install .+", said[kind]), said[kind]


def test_report_without_optional_packages():
    finished = command(absent=("torch", "cupy", "numba", "matplotlib"))
    assert finished.returncode == 0, finished.stderr
    said = fields(finished.stdout)
    assert said["torch"] == said["cupy"] == "not installed"
    assert said["CPU arrays"].endswith('pip install "cupy-msda[cpu]"')
    assert said["torch on CUDA"].endswith('pip install "cupy-msda[torch]"')
    assert said["CuPy arrays"].endswith('pip install "cupy-msda[cuda12x]"')
    assert "NumPy arrays: ok" in finished.stdout


def raising(message: str):
    def function(*_):
        raise RuntimeError(message)

    return function


def broken(folder: Path, module: str, error: str) -> dict[str, str]:
    """An environment in which the import of a module raises."""
    (folder / f"{module}.py").write_text(f"raise {error}")
    return {"PYTHONPATH": str(folder)}


@pytest.mark.parametrize("error", ["OSError('no library')", "ImportError('ABI')", "KeyError(1)"])
def test_report_names_a_torch_that_does_not_import(error, tmp_path):
    finished = command(**broken(tmp_path, "torch", error))
    assert finished.returncode == 1
    assert "Traceback" not in finished.stderr
    said = fields(finished.stdout)
    name = error.partition("(")[0]
    assert said["torch"].startswith(f"cannot be told ({name}")
    assert f"torch is installed and does not work ({name}" in said["torch on CUDA"]
    assert "NumPy arrays: ok" in finished.stdout
    assert "torch on the CPU: FAILED" in finished.stdout


@pytest.mark.parametrize(
    ("environment", "reason"),
    [
        ({"NUMBA_NUM_THREADS": "0"}, r"ValueError: Number of threads"),
        ({"NUMBA_DISABLE_JIT": "1"}, r"NUMBA_DISABLE_JIT is set"),
        (None, r"SystemError: llvmlite"),
    ],
)
def test_report_names_a_numba_that_does_not_work(environment, reason, tmp_path):
    if environment is None:
        environment = broken(tmp_path, "llvmlite", "SystemError('llvmlite')")
    finished = command(absent=("torch", "cupy"), warnings="always", **environment)
    assert finished.returncode == 0, finished.stderr
    assert len(re.findall("RuntimeWarning: Numba must import and compile", finished.stderr)) == 1
    assert re.search(f"the reference, slow: .*{reason}", fields(finished.stdout)["CPU arrays"])


@pytest.mark.parametrize(
    "environment",
    [
        {
            "PYTHONIOENCODING": "ascii",
            "CUPY_CACHE_DIR": "/gr\u00fcn",
            "NUMBA_CACHE_DIR": "/dev/null",
        },
        {"HOME": "/nowhere", "CUPY_CACHE_DIR": "/dev/null", "NUMBA_THREADING_LAYER": "none"},
    ],
)
def test_report_ends_in_no_traceback(environment):
    finished = command(absent=("torch",), warnings="ignore", **environment)
    assert finished.returncode == 0, finished.stderr
    assert not finished.stderr


def test_report_says_what_cannot_be_told(monkeypatch):
    monkeypatch.setattr(report, "cache_folder", raising("no such user"))
    said = dict(report.environment())["kernel cache"]
    assert said == "cannot be told (RuntimeError: no such user)"


def test_report_ends_quietly_when_its_reader_leaves():
    with subprocess.Popen(
        [sys.executable, "-m", "cupy_msda"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        cwd=ROOT,
    ) as process:
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 1


@pytest.mark.parametrize("name", ["demo", "bench"])
def test_commands_name_a_package_that_does_not_import(name, tmp_path):
    finished = command(name, **broken(tmp_path, "torch", "OSError('no library')"))
    assert finished.returncode == 1
    said = f"python -m cupy_msda {name}: cannot start: OSError: no library\n"
    assert finished.stderr == said


def test_report_counts_the_kernel_cache(tmp_path):
    (tmp_path / "a.cubin").write_bytes(bytes(1_500_000))
    said = dict(entry for entry in _environment_with_cache(tmp_path) if entry[0] == "kernel cache")
    assert said["kernel cache"] == f"{tmp_path} (1 files, 1.5 MB)"


def _environment_with_cache(folder):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CUPY_CACHE_DIR", str(folder))
        return list(report.environment())


def test_report_reads_nvidia_smi(tmp_path, monkeypatch):
    script = tmp_path / "nvidia-smi"
    script.write_text(
        "#!/bin/sh\necho '580.65, 0, NVIDIA H100, 9.0, 81559 MiB'\necho '580.65, 1, B, 10.0, 1 MiB'\n"
    )
    script.chmod(stat.S_IRWXU)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    said = dict(report.environment())
    assert said["driver"] == "580.65"
    assert said["device 0"] == "NVIDIA H100, 9.0, 81559 MiB"
    assert said["device 1"] == "B, 10.0, 1 MiB"


@pytest.mark.parametrize(
    ("script", "expected"),
    [
        ("#!/bin/sh\necho 'No devices were found'", "failed: No devices were found"),
        ("#!/bin/sh\nprintf '\\377'; exit 3", "failed: \ufffd"),
        ("#!/no/such/shell", "failed: FileNotFoundError"),
    ],
)
def test_report_says_what_nvidia_smi_says_instead(script, expected, tmp_path, monkeypatch):
    (tmp_path / "nvidia-smi").write_text(script)
    (tmp_path / "nvidia-smi").chmod(stat.S_IRWXU)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    assert f"nvidia-smi {expected}" in dict(report.environment())["driver"]


@pytest.mark.parametrize(
    ("function", "replacement", "expected"),
    [
        ("runtime.getDeviceCount", lambda: 0, r"the driver offers no CUDA device: see nvidia-smi"),
        (
            "runtime.getDeviceCount",
            raising("cudaErrorNoDevice: none"),
            r"no usable .*cudaErrorNoDevice",
        ),
        (
            "runtime.getDeviceCount",
            raising("lost"),
            r'does not work .*lost\): pip install "cupy-msda\[',
        ),
        (
            "nvrtc.getVersion",
            raising("no libnvrtc"),
            r'NVRTC does not load .*: pip install "cupy-msda\[',
        ),
        ("nvrtc.getVersion", lambda: (13, 0), None),
    ],
)
def test_report_tells_what_keeps_cupy_from_running(function, replacement, expected, monkeypatch):
    cuda = pytest.importorskip("cupy", reason="looks into CuPy").cuda
    monkeypatch.setattr(cuda.runtime, "getDeviceCount", lambda: 1)
    module, name = function.split(".")
    monkeypatch.setattr(getattr(cuda, module), name, replacement)
    said = report.cupy_obstacle.__wrapped__()
    assert said is None if expected is None else re.search(expected, said)


@pytest.mark.parametrize(
    ("driver", "expected"),
    [
        (
            12040,
            r"driver, for CUDA 12\.4, is too old .*: install a newer driver or, .* pip install",
        ),
        (0, r"no usable NVIDIA driver .*: install the driver"),  # the same error without a driver
    ],
)
def test_report_tells_of_a_driver_that_is_too_old(driver, expected, monkeypatch):
    runtime = pytest.importorskip("cupy", reason="looks into CuPy").cuda.runtime
    monkeypatch.setattr(runtime, "getDeviceCount", raising("cudaErrorInsufficientDriver: CUDA"))
    monkeypatch.setattr(runtime, "driverGetVersion", lambda: driver)
    assert re.search(expected, report.cupy_obstacle.__wrapped__())


@pytest.mark.parametrize(
    ("number", "package"), [((12, 4), "nvidia-cuda-nvrtc-cu12"), ((13, 0), "nvidia-cuda-nvrtc")]
)
def test_report_tells_of_a_compiler_older_than_the_gpu(number, package, monkeypatch):
    capability = "103"
    nvrtc = SimpleNamespace(getVersion=lambda: number, getSupportedArchs=lambda: [75, 80, 90])
    device = lambda: SimpleNamespace(compute_capability=capability)  # noqa: E731 - as a class
    fake = SimpleNamespace(cuda=SimpleNamespace(nvrtc=nvrtc, Device=device))
    monkeypatch.setattr(report, "_import_cupy", lambda: fake)
    monkeypatch.setattr(report, "find_spec", lambda name: True)
    said = report._nvrtc_version()
    assert said.startswith(
        f"{number[0]}.{number[1]} (knows GPUs up to compute capability 9.0, got 10.3"
    )
    assert said.endswith(f"pip install --upgrade {package})")
    capability = "90"
    assert report._nvrtc_version() == f"{number[0]}.{number[1]}"


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        (
            ["cupy-cuda12x 14.2.0"],
            r"torch is built for CUDA 13\.0: pip install .*cuda13x.* fits it",
        ),
        (["cupy-cuda13x 14.2.0"], None),
        (["cupy-cuda12x 14.2.0", "cupy-cuda13x 14.2.0"], "uninstall all and install one"),
    ],
)
def test_report_tells_of_a_cupy_that_does_not_fit(found, expected, monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(report, "find_spec", lambda name: True)
    monkeypatch.setattr(report, "distributions", lambda: found)
    said = report._cupy_version()
    assert said.startswith(" and ".join(found))
    assert re.search(expected, said) if expected else said == found[0]


def test_report_tells_of_a_cache_that_cannot_be_written(tmp_path, monkeypatch):
    pytest.importorskip("cupy", reason="there is no cache without it")
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("CUPY_CACHE_DIR", str(tmp_path / "file" / "cache"))
    said = dict(report.environment())["kernel cache"]
    assert re.search(
        r"cannot be written \(NotADirectoryError.*set CUPY_CACHE_DIR to a folder", said
    )


def test_report_tells_of_a_file_that_hides_a_package(tmp_path):
    (tmp_path / "torch.py").write_text("")
    finished = command(warnings="ignore", PYTHONPATH=str(tmp_path))
    said = fields(finished.stdout)
    assert said["torch is hidden"] == f"by {tmp_path / 'torch.py'}: rename that file"
    assert "Traceback" not in finished.stderr


def test_report_tells_of_a_compiled_extension(tmp_path, monkeypatch):
    name = "MultiScaleDeformableAttention"
    monkeypatch.delitem(sys.modules, name, raising=False)
    assert "extension" not in dict(report.environment())
    path = tmp_path / f"{name}.py"
    path.write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    cure = "call cupy_msda.integrations.deformable_detr.install() before anything imports it"
    assert dict(report.environment())["extension"] == f"{name} is installed in {path}: {cure}"
    importlib.import_module(name)
    assert dict(report.environment())["extension"] == f"{name} is imported from {path}: {cure}"
    monkeypatch.setitem(sys.modules, name, deformable_detr)
    assert "extension" not in dict(report.environment())


def test_report_as_json(plain_report):
    finished = command("--json")
    assert finished.returncode == 0, finished.stderr
    data = json.loads(finished.stdout)
    said = fields(plain_report.stdout)
    parts = [data[part] for part in ("environment", "integrations", "plans")]
    assert set().union(*parts) == said.keys() - {"self-check"}
    assert data["environment"]["torch"] == said["torch"]
    checked = {row["backend"]: row["passed"] for row in data["self_check"]}
    assert checked.keys() >= {"NumPy arrays", "torch on the CPU"}
    assert all(checked.values())


@pytest.mark.parametrize("output", [[], ["--json"]])
def test_a_failed_self_check_is_the_exit_status(output, monkeypatch, capsys):
    monkeypatch.setattr(report, "self_check", lambda: iter([("NumPy arrays", False, "wrong")]))
    assert __main__.main(output) == 1
    assert "NumPy arrays" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("cuda", "hip", "available", "expected"),
    [
        (None, None, False, r"is a CPU build: pip install"),
        (None, "7.0", True, r"built for AMD GPUs"),
        ("13.0", None, False, r"for CUDA 13\.0 finds no usable device: install"),
        ("13.0", None, True, None),
    ],
)
def test_report_tells_what_keeps_torch_from_running(cuda, hip, available, expected, monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setattr(torch.version, "hip", hip)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: available)
    monkeypatch.setattr(report, "cupy_obstacle", lambda: None)
    said = report.torch_obstacle.__wrapped__()
    assert said is None if expected is None else re.search(expected, said)


@pytest.mark.parametrize(
    ("cuda", "extra"), [(None, "cuda12x"), ("12.8", "cuda12x"), ("13.0", "cuda13x")]
)
def test_report_names_the_cupy_that_fits_torch(cuda, extra, monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setattr(report, "find_spec", lambda name: None if name == "cupy" else True)
    assert report.cupy_obstacle.__wrapped__().endswith(f'pip install "cupy-msda[{extra}]"')


def test_report_names_the_kernels_of_a_plan_and_why(monkeypatch):
    """On a device as large as an H200, which no kernel has to run on for that."""
    runtime = SimpleNamespace(getDevice=lambda: 0)
    monkeypatch.setitem(sys.modules, "cupy", SimpleNamespace(cuda=SimpleNamespace(runtime=runtime)))
    monkeypatch.setattr(report, "cupy_obstacle", lambda: None)
    monkeypatch.setattr(launch, "describe", lambda _: Device(132, "90"))
    assert dict(report.plans()) == {
        "encoder forward": "msda_forward_persistent: persistent, 1 per multiprocessor: model",
        "encoder backward": "msda_backward_value_binned, msda_backward_persistent: "
        "binned; points persistent, 1 per multiprocessor: model",
        "decoder forward": "msda_forward: plain, split-K 4, blocks of 64: model",
        "decoder backward": "msda_backward: plain, split-K 2, blocks of 64: model",
    }
    monkeypatch.setattr(tuned, "choice", lambda *_: Choice("plain, split-K 1", "tuned on sm_90"))
    said = dict(report.plans())
    assert said["encoder forward"] == "msda_forward: plain, split-K 1: tuned on sm_90"
    assert said["encoder backward"] == "msda_backward: plain, split-K 1: tuned on sm_90"


def test_typical_problems_are_an_encoder_and_a_decoder():
    encoder, decoder = report.TYPICAL["encoder"], report.TYPICAL["decoder"]
    assert (
        encoder.num_queries
        == encoder.spatial_size
        == 22223
        == report.PYRAMID.levels[-1].start + 273
    )
    assert decoder.spatial_size == 22223 > decoder.num_queries


def test_report_names_no_plan_without_a_device(monkeypatch):
    monkeypatch.setattr(report, "cupy_obstacle", lambda: "no device")
    assert list(report.plans()) == []


@pytest.mark.parametrize("wrong", ["value", "not finite", "raises"])
def test_self_check_fails_on_a_wrong_backend(wrong, monkeypatch, capsys):
    backend = cpu.backend()
    right = backend.forward

    def forward(*arguments, **options):
        output = right(*arguments, **options)
        if wrong == "raises":
            raise RuntimeError("out of order")
        output[0, 0, 0] += 1e-4 if wrong == "value" else np.nan
        return output

    monkeypatch.setattr(backend, "forward", forward)
    assert __main__.main([]) == 1
    said = capsys.readouterr().out
    assert "NumPy arrays: FAILED" in said
    assert ("RuntimeError: out of order" in said) == (wrong == "raises")


def test_json_is_for_the_report_alone(capsys):
    with pytest.raises(SystemExit):
        __main__.main(["--json", "demo"])
    assert "--json must stand without a command, got demo" in capsys.readouterr().err


def test_unknown_command():
    finished = command("dmeo")
    assert finished.returncode == 2
    assert "invalid choice: 'dmeo'" in finished.stderr


@pytest.fixture(scope="module")
def picture(tmp_path_factory):
    """Small enough to be quick: a bright disc on a dark ramp."""
    y, x = np.mgrid[:64, :96]
    pixels = np.stack([x, y, 0 * x], axis=-1) + 120 * (np.hypot(x - 48, y - 32) < 20)[..., None]
    path = tmp_path_factory.mktemp("demo") / "disc.png"
    Image.fromarray(pixels.astype(np.uint8)).save(path)
    return path


def pixels(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB")).astype(int)


@pytest.fixture(scope="module")
def demonstrated(picture):
    output = picture.with_name("out.png")
    # As in a notebook, https://github.com/googlecolab/colabtools/issues/5148: matplotlib does not import with it.
    notebook = {"MPLBACKEND": "module://not_installed.backend_inline"}
    return command("demo", "--image", picture, "--output", output, **notebook), output


def test_demo_compares_and_times(demonstrated):
    finished, _ = demonstrated
    assert finished.returncode == 0, finished.stdout + finished.stderr
    said = finished.stdout
    names = ("output", "gradient of value", "gradient of locations", "gradient of weights")
    for name in names:
        theirs, ours, part = map(
            float, re.search(rf"{name}[ *]+(\S+) +(\S+) +(\S+)\n", said).groups()
        )
        assert 0 < ours < 3 * theirs < 1e-4
        assert 0 < part <= 1
    for what in ("operator", "MSDeformAttn"):
        for passes in ("forward", "forward and backward"):
            assert re.search(rf"{what}, {passes} +[\d.]+ ms +[\d.]+ ms +[\d.]+ x", said)
    assert "all errors within budget" in said


def test_demo_draws_points_in_every_colour(demonstrated):
    _, output = demonstrated
    drawn = pixels(output)
    height, width = drawn.shape[:2]
    assert width == 2 * 768
    assert abs(height - (768 * 64 / 96 + 55)) < 1
    picture = drawn[: height - 60, :768]  # above the legend, beside the heat map
    for colour in plot.COLOURS:
        wanted = np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)])
        assert (np.abs(picture - wanted).max(-1) < 40).sum() > 50, colour
    assert (picture.min(-1) > 250).sum() > 50  # the marks of the queries


def test_demo_fails_on_a_wrong_operator(picture, monkeypatch, capsys, tmp_path):
    right = demo.ms_deform_attn
    monkeypatch.setattr(demo, "ms_deform_attn", lambda *arguments: right(*arguments) * (1 + 1e-4))
    monkeypatch.setattr(demo, "REPEATS", 1)
    status = __main__.main(["demo", "--image", str(picture), "--output", str(tmp_path / "out.png")])
    assert status == 1
    assert "FAILED: an error is outside its budget" in capsys.readouterr().out


@pytest.mark.parametrize("size", [(1, 1), (7, 300), (2000, 30)])
def test_demo_takes_any_size(size, tmp_path):
    Image.new("L", size, 128).save(tmp_path / "odd.png")
    scene = demo.build_scene(demo.load_picture(tmp_path / "odd.png"), "cpu")
    demo.draw(scene, demo.build_module("cpu"), tmp_path / "out.png")
    height, width, _ = pixels(tmp_path / "out.png").shape
    assert width == 2 * 768
    assert 55 < height <= 2 * 768 + 55


GREY = np.add.outer(np.arange(0, 96, 2), np.arange(0, 128, 2)).astype(np.uint8)  # 48, 64; to 220
COLOURED = np.stack([GREY, GREY[::-1], GREY[:, ::-1]], axis=-1)
# Grey of more than 8 bits, which PIL's `convert` clips to 0 to 255.
DEEP = {
    "16 bits": (GREY * np.uint16(257), "png"),
    "16 bits, big-endian": ((GREY * np.uint16(257)).astype(">u2"), "tif"),
    "12 bits in 16": ((GREY * (4095 / 255)).astype(np.uint16), "png"),
    "32 bits": (GREY * np.int32(257), "tif"),
    "8 bits in 32": (GREY.astype(np.int32), "tif"),
    "fractions": (GREY / np.float32(255), "tif"),
    "floats to 255": (GREY.astype(np.float32), "tif"),
}


def opened(pixels: Image.Image | np.ndarray, path: Path, **options) -> np.ndarray:
    """A picture as the demo reads it from a file, in 8 bits."""
    picture = Image.fromarray(pixels) if isinstance(pixels, np.ndarray) else pixels
    picture.save(path, **options)
    return (demo.load_picture(path) * 255).round().astype(int)


@pytest.mark.parametrize("kind", DEEP)
def test_demo_scales_deep_grey(kind, tmp_path):
    grey, extension = DEEP[kind]
    shown = opened(grey, tmp_path / f"deep.{extension}")
    assert np.abs(shown - GREY[..., None]).max() <= 1


@pytest.mark.parametrize(
    ("low", "high", "dtype"),
    [
        (-1000, 3000, np.int32),
        (0, 10**7, np.int32),
        (-0.25, 0.75, np.float32),
        (0, 1e7, np.float32),
    ],
)
def test_demo_stretches_grey_beyond_any_white(low, high, dtype, tmp_path):
    ramp = GREY / GREY.max()
    shown = opened((low + (high - low) * ramp).astype(dtype), tmp_path / "deep.tif")
    assert np.abs(shown - 255 * ramp[..., None]).max() <= 1


@pytest.mark.parametrize(("number", "shade"), [(0, 0), (1, 255), (-7, 0), (70_000, 0)])
def test_demo_takes_deep_grey_of_one_shade(number, shade, tmp_path):
    assert (opened(np.full((5, 7), number, np.int32), tmp_path / "plain.tif") == shade).all()


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_demo_refuses_grey_that_is_not_finite(bad, tmp_path):
    grey = GREY.astype(np.float32)
    grey[0, 0] = bad
    with pytest.raises(SystemExit, match=r"deep\.tif cannot be read: .*its pixels must be finite"):
        opened(grey, tmp_path / "deep.tif")


@pytest.mark.parametrize(
    ("mode", "extension", "tolerance"),
    [
        ("CMYK", "tif", 1),
        ("YCbCr", "tif", 4),
        ("P", "png", 48),  # a palette of 216 colours
        ("P", "gif", 48),
    ],
)
def test_demo_shows_the_colours_of_every_mode(mode, extension, tolerance, tmp_path):
    picture = Image.fromarray(COLOURED).convert(mode)
    shown = opened(picture, tmp_path / f"coloured.{extension}")
    assert np.abs(shown - COLOURED).max() <= tolerance


def test_demo_shows_pictures_in_lab(tmp_path):
    srgb, lab = ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB")
    soft = Image.fromarray(COLOURED // 2 + 64)  # LAB of 8 bits is coarse where colours are strong
    picture = ImageCms.profileToProfile(soft, srgb, lab, outputMode="LAB")
    assert np.abs(opened(picture, tmp_path / "lab.tif") - np.asarray(soft)).max() <= 8


def test_demo_shows_black_and_white(tmp_path):
    shown = opened(Image.fromarray(GREY > 99), tmp_path / "bits.png")
    assert np.array_equal(shown, np.repeat(255 * (GREY > 99)[..., None], 3, axis=-1))


@pytest.mark.parametrize(
    ("mode", "transparent", "opaque", "option"),
    [
        ("LA", (0, 0), (99, 255), None),
        ("RGBA", (200, 0, 0, 0), (99, 99, 99, 255), None),
        ("L", 0, 99, 0),
        ("RGB", (0, 0, 0), (99, 99, 99), (0, 0, 0)),
        ("P", 0, 1, 0),
    ],
)
def test_demo_shows_transparency_over_white(mode, transparent, opaque, option, tmp_path):
    """What `convert("RGB")` shows there is whatever the file has under it."""
    picture = Image.new(mode, (6, 4), transparent)
    picture.paste(opaque, (3, 0, 6, 4))
    if mode == "P":
        picture.putpalette([200, 0, 0, 99, 99, 99])
    options = {} if option is None else {"transparency": option}
    shown = opened(picture, tmp_path / "transparent.png", **options)
    assert (shown[:, :3] == 255).all()
    assert (shown[:, 3:] == 99).all()


def test_demo_blends_what_is_half_transparent(tmp_path):
    picture = Image.new("RGBA", (4, 4), (255, 0, 0, 51))
    assert (opened(picture, tmp_path / "half.png") == (255, 204, 204)).all()


@pytest.mark.parametrize(("pixels", "extension"), [(COLOURED, "jpg"), (DEEP["16 bits"][0], "png")])
def test_demo_turns_pictures_as_their_camera_was_held(pixels, extension, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # orientation: a quarter turn clockwise
    turned = opened(pixels, tmp_path / f"turned.{extension}", exif=exif)
    upright = opened(pixels, tmp_path / f"upright.{extension}")
    assert np.array_equal(turned, np.rot90(upright, -1))


@pytest.mark.parametrize("extension", ["gif", "png", "tif", "webp"])
def test_demo_shows_the_first_frame(extension, tmp_path):
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    options = {"lossless": True} if extension == "webp" else {}
    shown = opened(
        frames[0],
        tmp_path / f"moving.{extension}",
        save_all=True,
        append_images=frames[1:],
        **options,
    )
    assert (shown == (255, 0, 0)).all()


def test_demo_ships_a_photograph():
    picture = demo.load_picture(demo.PICTURE)
    assert picture.shape == (400, 600, 3)
    assert picture.std() > 0.1
    assert len(demo.salient_queries(demo.build_scene(picture, "cpu"))) == demo.QUERIES_DRAWN


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--image", "no_such.jpg"], r"the picture no_such\.jpg cannot be read: .*No such file"),
        (
            ["--image", "pyproject.toml"],
            r"the picture pyproject\.toml cannot be read: .*cannot identify",
        ),
    ],
)
def test_demo_names_a_picture_that_cannot_be_read(arguments, message):
    finished = command("demo", *arguments)
    assert finished.returncode == 1
    assert re.search(message, finished.stderr)
    assert "Traceback" not in finished.stderr


def png(width: int, height: int) -> bytes:
    """A PNG whose header claims a size; its pixels are absent."""
    parts = b"\x89PNG\r\n\x1a\n"
    header = width.to_bytes(4, "big") + height.to_bytes(4, "big") + bytes([8, 2, 0, 0, 0])
    for chunk in (b"IHDR" + header, b"IDAT" + zlib.compress(b""), b"IEND"):
        parts += (len(chunk) - 4).to_bytes(4, "big") + chunk + zlib.crc32(chunk).to_bytes(4, "big")
    return parts


def test_demo_names_a_picture_that_is_too_large(tmp_path):
    (tmp_path / "bomb.png").write_bytes(png(20_000, 20_000))
    finished = command("demo", "--image", tmp_path / "bomb.png")
    assert finished.returncode == 1
    assert re.fullmatch(
        r"the picture \S+bomb\.png cannot be read: .*400000000 pixels.*\n", finished.stderr
    )


FORMATS = ["PNG", "JPEG", "GIF", "TIFF", "BMP", "WEBP", "ICO", "PPM", "TGA"]
FORMATS += ["AVIF"] if "avif" in features.get_supported_modules() else []


@pytest.mark.parametrize("form", FORMATS)
def test_demo_reads_a_damaged_picture_or_names_it(form, tmp_path):
    rng = random.Random(0)
    noise = np.frombuffer(rng.randbytes(24 * 40 * 3), np.uint8).reshape(24, 40, 3)
    whole = io.BytesIO()
    Image.fromarray(noise).save(whole, form)
    path = tmp_path / "damaged"
    said = []
    for _ in range(40):
        damaged = bytearray(whole.getvalue())
        for _ in range(rng.choice([0, 1, 20])):
            damaged[rng.randrange(min(len(damaged), 400))] = rng.randrange(256)
        path.write_bytes(damaged[: rng.randrange(len(damaged))])
        try:
            picture = demo.load_picture(path)
        except SystemExit as error:
            said.append(str(error))
        else:
            assert picture.ndim == 3
    assert said
    for line in said:
        assert re.fullmatch(r"the picture \S+/damaged cannot be read: \w+: .+", line)


def test_demo_names_an_output_that_cannot_be_written(picture, tmp_path):
    scene = demo.build_scene(demo.load_picture(picture), "cpu")
    with pytest.raises(SystemExit, match=r"absent/out\.png cannot be written"):
        demo.draw(scene, demo.build_module("cpu"), tmp_path / "absent" / "out.png")


@pytest.mark.parametrize(
    ("absent", "names"),
    [
        (["torch"], "torch"),
        (["matplotlib"], "matplotlib"),
        (["matplotlib", "PIL"], "matplotlib and pillow"),
    ],
)
def test_demo_says_what_to_install(absent, names):
    finished = command("demo", absent=absent)
    assert finished.returncode == 1
    wanted = f'{names} must be installed: pip install "cupy-msda[torch,cpu,plot]"'
    assert wanted in finished.stderr
    assert "Traceback" not in finished.stderr
