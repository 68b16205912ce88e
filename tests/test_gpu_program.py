"""gpu_program: the kernels of a step are counted from a program's text; the plugin's absence is said."""

import os
import pathlib
import runpy
import subprocess
import sys
import types

import jax
import pytest
from jax.experimental import topologies

import tiny
from jaxcifar import gpu_program
from jaxcifar.errors import UserError

ROOT = pathlib.Path(__file__).resolve().parent.parent
TEXT = """HloModule jit_train_steps, is_scheduled=true

%fused_add (param_0: f32[8,4]) -> f32[8,4] {
  %param_0 = f32[8,4]{1,0} parameter(0)
  ROOT %add.1 = f32[8,4]{1,0} add(%param_0, %param_0), metadata={op_name="jit(f)/while/body/optimizer/add"}
}

%body (arg: (s32[], f32[8,4])) -> (s32[], f32[8,4]) {
  %arg = (s32[], f32[8,4]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%arg), index=0
  %x = f32[8,4]{1,0} get-tuple-element(%arg), index=1
  %pick = bf16[8,4]{1,0} fusion(%x, %i), kind=kLoop, calls=%f, metadata={op_name="jit(f)/while/body/augment/gather"}
  %conv.1 = (f32[2,4]{1,0}, u8[0]{0}) custom-call(%x, %pick), custom_call_target="__cudnn$convForward", \
metadata={op_name="jit(f)/while/body/jvp(Net)/layer1.0/conv1/conv_general_dilated"}
  %mm.1 = (f32[2,4]{1,0}, s8[33554432]{0}) custom-call(%x, %x), custom_call_target="__cublas$gemm", \
metadata={op_name="jit(f)/while/body/transpose(jvp(Net))/fc/dot_general"}
  %y = f32[8,4]{1,0} fusion(%x), kind=kLoop, calls=%fused_add
  ROOT %out = (s32[], f32[8,4]{1,0}) tuple(%i, %y)
}

%cond (arg.1: (s32[], f32[8,4])) -> pred[] {
  %arg.1 = (s32[], f32[8,4]{1,0}) parameter(0)
  %i.1 = s32[] get-tuple-element(%arg.1), index=0
  ROOT %less = pred[] compare(%i.1, %i.1), direction=LT
}

ENTRY %main (p: f32[8,4]) -> f32[8,4] {
  %p = f32[8,4]{1,0} parameter(0)
  %zero = s32[] constant(0)
  %start = (s32[], f32[8,4]{1,0}) tuple(%zero, %p)
  %loop = (s32[], f32[8,4]{1,0}) while(%start), condition=%cond, body=%body
  ROOT %result = f32[8,4]{1,0} get-tuple-element(%loop), index=1
}
"""


def test_kernels_of_the_loop_body_with_their_bytes_and_parts():
    found = {k.name: (k.part, k.num_bytes, k.is_convolution) for k in gpu_program.kernels(TEXT)}
    assert found == {
        "pick": ("augment", 128 + 4 + 64, False),
        "conv.1": ("forward", 128 + 64 + 32, True),
        "mm.1": ("backward", 2 * 128 + 32, False),
        "y": ("optimizer", 2 * 128, False)}


def test_without_a_loop_the_entry_is_the_step():
    plain = TEXT[:TEXT.index("%body (")] + TEXT[TEXT.index("ENTRY"):].replace(
        "while(%start), condition=%cond, body=%body", "custom-call(%start)")
    assert [kernel.name for kernel in gpu_program.kernels(plain)] == ["loop"]


def test_the_table_has_a_line_for_each_part_and_for_the_largest_kernels():
    lines = gpu_program.table(gpu_program.kernels(TEXT))
    assert [line.split()[:3] for line in lines[1:6]] == [
        ["augment", "1", "0"], ["backward", "1", "0"], ["forward", "1", "1"],
        ["optimizer", "1", "0"], ["all", "4", "1"]]
    assert lines[-4].split() == ["0.0", "mm.1", "fc/dot_general,", "backward"]


def test_a_speedrun_is_compiled_whole(monkeypatch):
    config = runpy.run_path(str(ROOT / "configs" / "speedrun.py"))["get_config"]("94")
    config.model.channels = (8, 8, 8)
    compiled = []
    monkeypatch.setattr(topologies, "get_topology_desc",
                        lambda **kwargs: types.SimpleNamespace(devices=jax.devices("cpu")))
    monkeypatch.setattr(jax, "jit", lambda function, donate_argnums: types.SimpleNamespace(
        lower=lambda *arguments: types.SimpleNamespace(
            compile=lambda: compiled.append((jax.eval_shape(function, *arguments), arguments)))))
    gpu_program.compiled(config)
    (variables, (seed, images, labels)), = compiled
    assert variables["params"]["group1"]["conv1"]["kernel"].shape == (3, 3, 24, 8)
    assert (seed.shape, images.shape, labels.shape) == ((), (50_000, 32, 32, 3), (50_000,))


def test_a_missing_plugin_is_said_and_jax_is_as_before(monkeypatch):
    def missing(**kwargs):
        raise NotImplementedError("topology not implemented for cuda")

    before = jax.default_backend
    monkeypatch.setattr(topologies, "get_topology_desc", missing)
    with pytest.raises(UserError, match="CUDA plugin is not installed: see the head of"):
        gpu_program.compiled(tiny.tiny_config())
    assert jax.default_backend is before


@pytest.mark.parametrize(("fields", "out", "message"), [
    ({"deterministic": True}, "", "config.deterministic = True changes nothing here"),
    ({"cuda_graphs": "step"}, "", "config.cuda_graphs = 'step' changes nothing here"),
    ({}, "missing/program.txt", "there is no folder missing"),
])
def test_what_would_change_nothing_or_be_lost_is_refused_before_the_work(
        fields, out, message, monkeypatch):
    for name in ("configure", "compiled"):
        monkeypatch.setattr(gpu_program, name, lambda *args: pytest.fail("compiled"))
    monkeypatch.setattr(gpu_program.main_lib, "refuse_flags_of_a_run", lambda why: None)
    monkeypatch.setattr(gpu_program, "_OUT", types.SimpleNamespace(value=out))
    with pytest.raises(UserError, match=message):
        gpu_program._print(tiny.tiny_config(**fields))


def test_a_validation_set_of_all_images_leaves_none_to_train_on():
    config = tiny.tiny_config(dataset="cifar10", val_size=60_000)
    with pytest.raises(UserError, match="val_size = 60000 leaves none of the 50,000 training images"):
        gpu_program._data(config)


@pytest.mark.parametrize("module, flag", [
    ("gpu_program", "workdir"), ("speedrun", "seeds"), ("tune", "profile")])
def test_flags_of_a_run_are_refused_where_they_have_no_meaning(module, flag):
    command = [sys.executable, "-m", f"jaxcifar.{module}", "--config=configs/quickstart.py", f"--{flag}=1"]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | {"JAX_PLATFORMS": "cpu"},
                          capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: --{flag} has no meaning ")
