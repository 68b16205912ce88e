"""What an operation takes, traced on CPU and from a made-up trace of a GPU; compilations."""

import io
import threading
from types import SimpleNamespace

import jax
import numpy as np
import pytest
import tiny

from jaxcifar import logs, parallel, profiling, programs, trace, train
from jaxcifar.errors import UserError
from jaxcifar.state import create_state
from jaxcifar.task import create_task

TEXT = """\
%inner.1 (p: f32[8]) -> f32[8] {
  ROOT %add.9 = f32[8]{0} add(%p, %p), metadata={op_name="jit(train_steps)/jvp(ResNet)/bn1/add"}
}

ENTRY %main (a: f32[8]) -> f32[8] {
  %while.2 = (s32[], f32[8]{0}) while(%t), condition=%c, body=%b, metadata={op_name="jit(t)/while"}
  %loop_add_fusion.1 = f32[8]{0} fusion(%a), kind=kLoop, calls=%inner.1
  ROOT %conv-backward.3 = f32[8]{0} custom-call(%a), \
metadata={op_name="jit(t)/transpose(jvp(ResNet))/layer2.0/conv1/conv_general_dilated"}
}
"""


def event(name, start, duration, /, **stats):
    """Return an event of a trace, times in microseconds, like jax.profiler's."""
    return SimpleNamespace(name=name, start_ns=1e3 * start, duration_ns=1e3 * duration,
                           stats=list(stats.items()))


def plane(name, **lines):
    """Return a plane of a trace with its lines of events."""
    return SimpleNamespace(name=name, lines=[
        SimpleNamespace(name=line.replace("_", " #"), events=events)
        for line, events in lines.items()])


def gpu_planes():
    """Return a trace of two calls on a GPU, with the stats that XLA's CUPTI collector writes."""
    module = {"hlo_module": "jit_train_steps", "program_id": 7, "correlation_id": 1}
    compute = [
        event("sm90_xmma_dgrad", 100, 40, hlo_op="conv-backward.3", name="conv1", **module),
        event("loop_add_fusion_1", 140, 10, hlo_op="command_buffer.1", **module),
        event("sm90_xmma_dgrad", 300, 40, hlo_op="conv-backward.3", name="conv1", **module)]
    copies = [event("MemcpyD2H", 130, 30, memcpy_details="kind:device size:4")]
    steps = [event("1", 100, 300)]  # repeats the time of all kernels
    host = [event("profiled call", 50, 20), event("profiled call", 250, 20),
            event("other", 0, 1000)]
    return [plane("/host:CPU", python=host),
            plane("/device:GPU:0", Stream_13=compute, Stream_14=copies, Steps=steps),
            plane("/host:metadata")]


def test_a_trace_of_a_gpu():
    profile = trace.read(gpu_planes(), TEXT, "profiled call", "gpu")
    took = {op.name: (op.ns / 1e3, op.count) for op in profile.operations}
    # From 130 to 150 us two streams work side by side: half of that for each.
    assert took == {"conv-backward.3": (35 + 40, 2), "MemcpyD2H": (5 + 5 + 10, 1),
                    "loop_add_fusion.1": (5, 1)}
    assert (profile.total_ns, profile.busy_ns) == (240e3, 100e3)
    assert profile.between_ns == [140e3], "from 160 to 300, when the second call began"
    places = {op.name: trace.place(op.op_name) for op in profile.operations}
    assert places["conv-backward.3"] == "layer2.0/conv1/conv_general_dilated, backward"
    assert places["loop_add_fusion.1"] == "bn1/add", "of the computation that it fuses"


def test_lines_that_repeat_the_kernels_time_do_not_count():
    planes = gpu_planes()
    expected = trace.read(planes, TEXT, "profiled call", "gpu")
    graph = event("command_buffer.1", 100, 60, hlo_op="command_buffer.1")
    planes[1].lines.append(SimpleNamespace(name="XLA Ops", events=[graph]))
    assert trace.read(planes, TEXT, "profiled call", "gpu") == expected


def test_a_device_busy_when_a_call_began_did_not_wait():
    planes = gpu_planes()
    planes[1].lines[1].events.append(event("MemcpyH2D", 240, 20))
    profile = trace.read(planes, TEXT, "profiled call", "gpu")
    assert profile.between_ns == [0], "every change of calls counts in the mean"
    said = profiling.summary(profile, profiling.Calls(2, 1, 8), seconds=1.0)
    assert "between calls it waited 0 ms for the host" in said


def test_several_gpus_are_averaged():
    planes = gpu_planes()
    second = plane("/device:GPU:1", Stream_1=[event("k", 0, 20, hlo_op="conv-backward.3")])
    profile = trace.read([*planes, second], TEXT, "profiled call", "gpu")
    assert profile.num_devices == 2
    conv = next(op for op in profile.operations if op.name == "conv-backward.3")
    assert (conv.ns, conv.count) == ((75e3 + 20e3) / 2, 1.5)


def test_without_the_program_kernels_keep_their_operation():
    profile = trace.read(gpu_planes(), "", "profiled call", "gpu")
    assert {op.name for op in profile.operations} == {
        "conv-backward.3", "loop_add_fusion_1", "MemcpyD2H"}


def test_a_trace_of_the_cpu_counts_loops_and_threads_once():
    def op(name, start, duration, flow):
        return event(name, start, duration, hlo_op=name, device_ordinal=0, _p=flow)

    main = [op("while.2", 0, 10, 1),  # ends at 100, on the other thread
            op("conv-backward.3", 10, 5, 2),  # ends at 50
            event("ThunkExecutor::Execute", 0, 200)]
    other = [op("loop_add_fusion.1", 30, 40, 3), event("end: conv-backward.3", 50, 1, _c=2),
             event("end: loop_add_fusion.1", 70, 1, _c=3), event("end: while.2", 100, 1, _c=1)]
    profile = trace.read([plane("/host:CPU", python=main, pool=other)], TEXT, "call", "cpu")
    took = {operation.name: operation.ns / 1e3 for operation in profile.operations}
    assert took == {"while.2": 10 + 30, "conv-backward.3": 20 + 10, "loop_add_fusion.1": 10 + 20}
    assert profile.busy_ns == profile.total_ns == 100e3


def test_a_trace_without_operations_is_refused():
    with pytest.raises(UserError, match="no operation"):
        trace.read([plane("/host:CPU", python=[event("x", 0, 1)])], TEXT, "call", "cpu")


@pytest.mark.parametrize("with_plane", [True, False])
def test_launches_are_not_taken_for_kernels(with_plane):
    """Without CUPTI a GPU's plane is empty or missing; the host's has the thunks that launch."""
    launch = event("conv-backward.3", 100, 5, hlo_op="conv-backward.3", device_ordinal=0)
    planes = [plane("/host:CPU", python=[event("profiled call", 50, 20), launch])]
    if with_plane:
        planes.append(plane("/device:GPU:0", Steps=[event("1", 100, 300)]))
    with pytest.raises(UserError, match="no operation of the gpu: CUPTI"):
        trace.read(planes, TEXT, "profiled call", "gpu")
    assert trace.read(planes, TEXT, "profiled call", "cpu").busy_ns == 5e3


def profiled(config, workdir, monkeypatch, steps=3):
    """Run profiling.run on the tiny dataset; return its lines."""
    monkeypatch.setattr("jaxcifar.data.load", lambda name, data_dir: tiny.tiny_dataset())
    out = io.StringIO()
    profiling.run(config, workdir, steps, stream=out)
    return out.getvalue().splitlines()


def test_profiling_prints_the_operations_and_leaves_traces_only(tmp_path, monkeypatch):
    lines = profiled(tiny.tiny_config(), tmp_path, monkeypatch)
    titles = [i for i, line in enumerate(lines) if "images, resnet5m on cpu" in line]
    assert [lines[i].split(" images")[0] for i in titles] == [
        "3 training steps of 32", "2 evaluation batches of 32"]
    rows = [line.split() for line in lines[titles[0] + 2:titles[0] + 13]]
    shares = [float(row[1].rstrip("%")) for row in rows]
    assert shares[:10] == sorted(shares[:10], reverse=True)
    assert sum(shares) == pytest.approx(100, abs=1)
    assert rows[10][2:5] == ["the", "other", rows[10][4]]
    text = "\n".join(lines)
    assert "layer1.0/conv1/" in text and ", backward" in text
    ms = sum(float(row[0]) for row in rows)
    traced, idle = (float(text.split(mark)[1].split()[0].rstrip("%"))
                    for mark in ("(traced: ", "idle for "))
    assert ms == pytest.approx(traced * (1 - idle / 100), rel=0.02)
    assert {path.name for path in tmp_path.iterdir()} == {"profile"}
    for part in ("train", "eval"):
        assert list((tmp_path / "profile" / part).rglob("*.trace.json.gz"))


def test_profiling_on_several_devices_takes_the_mean(tmp_path, monkeypatch):
    lines = profiled(tiny.tiny_config(num_devices=2), tmp_path, monkeypatch, steps=2)
    assert lines.count("all of this is the mean of 2 devices") == 2


def test_a_profile_of_no_step_or_of_a_speedrun_is_refused(tmp_path, monkeypatch):
    with pytest.raises(UserError, match="--profile_steps=0"):
        profiled(tiny.tiny_config(), tmp_path, monkeypatch, steps=0)
    with pytest.raises(UserError, match="jaxcifar.speedrun"):
        profiled(tiny.tiny_config(speedrun__epochs=3), tmp_path, monkeypatch)


def test_a_call_of_an_epoch_is_shortened(monkeypatch):
    monkeypatch.setattr("jaxcifar.data.load", lambda name, data_dir: tiny.tiny_dataset())
    monkeypatch.setattr(programs, "runs_on_cpu", lambda devices: False)  # the form of accelerators
    monkeypatch.setattr(programs.Programs, "compile", lambda *args, **options: None)
    subject = profiling.prepare(tiny.tiny_config(batch_size=10), 6, lambda line: None)
    assert subject.programs.steps_at(0) == (3, 10), "not the epoch's 10; two calls make the 6"
    assert int(subject.live.step) == 0


@pytest.fixture
def compilations():
    """Programs that XLA compiles or reads from the cache, in order: (name, thread that waits)."""
    names = []

    def listener(event, duration, **details):
        if event.endswith("backend_compile_duration"):
            names.append((details.get("fun_name"), threading.current_thread().name))

    jax.monitoring.register_event_duration_secs_listener(listener)
    yield names
    jax.monitoring.unregister_event_duration_listener(listener)


def test_nothing_is_compiled_after_the_first_epoch(tmp_path, monkeypatch, compilations):
    counts = []
    config = tiny.tiny_config(epochs=3, test_every_epoch=True)
    tiny.fit(config, tmp_path, monkeypatch,
             after_epoch=lambda row: counts.append(len(compilations)))
    programs_ = [name for name, _ in compilations if name.endswith("_steps)")]
    assert sorted(programs_) == ["jit(eval_steps)", "jit(train_steps)", "jit(train_steps)"], (
        "full batches, the last batch, evaluation of every split")
    late = [name for name, thread in compilations[counts[0]:] if thread == "MainThread"]
    assert late == [], "the later epochs, and evaluation at the end, compile nothing"


def test_a_new_run_is_initialised_by_one_program(compilations):
    task = create_task(tiny.tiny_config(optimizer__name="adam", optimizer__momentum=0.0), 100, 10)
    compilations.clear()
    create_state(task, 0)
    assert [name for name, _ in compilations] == ["jit(build)"]


def tiny_programs(kind="jit", devices=1):
    """Return (Programs, device state, data) of the tiny configuration."""
    config = tiny.tiny_config(num_devices=devices, parallel=kind)
    train.configure_jax(config)
    used = parallel.create(config)
    task = create_task(config, 100, 10)
    dataset = tiny.tiny_dataset()
    data = {"images": dataset.train_images[:100], "labels": dataset.train_labels[:100]}
    state = create_state(task, 0).on_device()
    return (programs.Programs(task, used), used.replicate(jax.tree.map(np.asarray, state)),
            used.replicate(data))


@pytest.mark.parametrize(("kind", "devices"), [("jit", 1), ("pmap", 2), ("shard_map", 2)])
def test_the_state_is_donated_and_gathers_read_uint8(kind, devices):
    made, state, data = tiny_programs(kind, devices)
    made.compile(state, data, data)
    leaves = jax.tree.leaves(state.params)
    after = made.train(state, data, made.permutation(state), 0)
    assert all(leaf.is_deleted() for leaf in leaves), "their buffers hold the new state"
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves((after, data)))
    images = [line for line in made.texts()["train"].splitlines() if "[100,32,32,3]" in line]
    assert images and all("u8[100,32,32,3]" in line for line in images), "never the set as floats"
    assert any(" gather(" in line and "u8[" in line.split(" gather(")[0]
               for line in made.texts()["train"].splitlines())


def test_compiling_at_once_raises_what_compiling_alone_does():
    used = parallel.Parallel("jit", tuple(jax.devices()[:1]))

    def fails(x, *, axis_name, num_devices):
        raise ValueError("traced badly")

    def doubles(x, *, axis_name, num_devices):
        return 2 * x

    good, bad = used.program(doubles, name="doubles"), used.program(fails, name="fails")
    with pytest.raises(ValueError, match="traced badly"):
        parallel.compile_all({good: (np.ones(3),), bad: (np.ones(3),)})
    parallel.compile_all({good: (np.ones(3),)})
    assert "HloModule jit_doubles" in good.text()
    np.testing.assert_array_equal(good(np.ones(3, np.float32)), 2 * np.ones(3))


@pytest.mark.parametrize(("backend", "at_once"), [("cpu", True), ("gpu", False)])
def test_accelerators_compile_in_turn(backend, at_once, monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    meeting = threading.Barrier(2)

    class Program:
        def lower(self):
            return lambda: meeting.wait(60 if at_once else 0.2)

    made = {Program(): (), Program(): ()}
    if at_once:
        parallel.compile_all(made)
    else:
        with pytest.raises(threading.BrokenBarrierError):
            parallel.compile_all(made)


def test_a_profile_compiles_what_it_runs_and_a_run_what_its_later_epochs_need_too():
    task = create_task(tiny.tiny_config(), 100, 10)
    made = programs.Programs(task, parallel.Parallel("jit", tuple(jax.devices()[:1])))
    wanted = []
    for step, fields in ((0, {}), (0, {"whole_epoch": False}), (task.full_steps, {}), (
            task.full_steps, {"whole_epoch": False}), (task.full_steps, {"epochs_left": 1}), (
                task.full_steps, {"epochs_left": 0})):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(parallel, "compile_all", lambda calls: wanted.append(len(calls)))
            patch.setattr(made, "permutation", lambda state: None)
            state = create_state(task, 0).on_device()
            made.compile(state, None, None, step, **fields)
    assert wanted == [3, 2, 3, 2, 2, 1], "full batches, the last one, evaluation"


def test_a_picture_drawn_beside_the_training_is_waited_for_and_may_fail(tmp_path):
    out, drawn, go_on = io.StringIO(), [], threading.Event()
    log = logs.RunLog(tmp_path, primary=True, resume_epoch=None, tensorboard=False, stream=out)

    def draw(name):
        go_on.wait(60)
        drawn.append(name)

    def fail():
        raise RuntimeError("RESOURCE_EXHAUSTED: of the device's memory\nat length")

    log.meanwhile("samples.png", draw, "samples")
    log.meanwhile("other.png", fail)
    assert not drawn, "the training goes on"
    go_on.set()
    log.close()
    assert drawn == ["samples"]
    assert out.getvalue() == "other.png is missing: RESOURCE_EXHAUSTED: of the device's memory\n"


def test_plots_are_drawn_after_the_picture(tmp_path, monkeypatch):
    trained, plotting, order = threading.Event(), threading.Event(), []

    def draw(*args):
        trained.wait(60)
        order.append("plots came first" if plotting.wait(2) else "picture")

    def plot(*args):
        plotting.set()
        order.append("plots")

    monkeypatch.setattr("jaxcifar.data.load", lambda name, data_dir: tiny.tiny_dataset())
    monkeypatch.setattr("jaxcifar.report.run.samples", draw)
    monkeypatch.setattr("jaxcifar.report.run.write_plots", plot)
    train.fit(tiny.tiny_config(epochs=1), tmp_path, stream=io.StringIO(),
              after_epoch=lambda row: trained.set())
    assert order == ["picture", "plots"]
