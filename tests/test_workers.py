"""Readers of images that die, stall, cannot start or are left early: an error in time, no hang."""

import errno
import itertools
import mmap
import multiprocessing
import os
import resource
import signal
import threading
import time
from contextlib import suppress

import pytest
import torch
from runs import in_a_fork, limited, write_images

from quadmamba.configs import ConfigError, load_cfg
from quadmamba.data import DataError, LoaderError, build_loaders, reader
from quadmamba.data.datasets import FolderImages
from quadmamba.data.slots import Slots
from quadmamba.utils.modes import explained

READ = FolderImages.__getitem__


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """12 training and 12 validation images in two classes."""
    return write_images(tmp_path_factory.mktemp("data"), train=6, val=6)


def loaders_of(data, **keys):
    values = {"DATA.PATH": str(data), "DATA.IMG_SIZE": 16, "DATA.BATCH_SIZE": 2}
    values |= {"DATA.WORKERS": 2, "DATA.TIMEOUT": 1.0}
    values |= {key.replace("__", "."): value for key, value in keys.items()}
    return build_loaders(load_cfg(flags=values))


def fault(monkeypatch, act, *, at=5):
    """Let `act` happen where the image with this number is read."""

    def read(self, draw):
        if draw[1] == at:
            act()
        return READ(self, draw)

    monkeypatch.setattr(FolderImages, "__getitem__", read)


def error_of(batches):
    """The message of the LoaderError that ends a pass."""
    with pytest.raises(LoaderError) as caught:
        list(batches)
    return str(caught.value)


def children():
    return {child.pid for child in multiprocessing.active_children()}


def gone(pid):
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


def wait_for(condition, timeout=30):
    end = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.02)


# --------------------------------------------------------------------------------- a dead worker
def exit_at_once():
    os._exit(3)


def die_of(number):
    def act():
        if number != signal.SIGKILL:
            signal.signal(number, signal.SIG_DFL)  # pytest's faulthandler would report it
        os.kill(os.getpid(), number)

    act.__name__ = signal.Signals(number).name
    return act


@pytest.mark.parametrize("at", [0, 5])
@pytest.mark.parametrize(
    ("act", "words"),
    [
        (die_of(signal.SIGKILL), ["killed by SIGKILL", "memory", "DATA.WORKERS"]),
        (die_of(signal.SIGSEGV), ["killed by SIGSEGV", "decoder crashed", "check_data"]),
        (die_of(signal.SIGBUS), ["killed by SIGBUS"]),
        (exit_at_once, ["ended by itself (exit code 3)"]),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_H3_a_worker_that_dies_is_reported_with_its_file(data, monkeypatch, act, words, at):
    fault(monkeypatch, act, at=at)
    before = time.monotonic()
    loader = loaders_of(data, DATA__TIMEOUT=100.0).val
    path = loader.dataset.samples[at][0]
    message = in_a_fork(error_of, loader)
    assert all(word in message for word in [*words, f"reading {path}", "loader worker"]), message
    others = "/".join(loader.dataset.samples[at - at % 2 + 1][0].split("/")[-2:])
    assert others in message, "the batch is named"
    assert time.monotonic() - before < 50, "no one waited for the timeout"


def test_H3_a_worker_that_dies_before_it_reads_is_reported(data, monkeypatch):
    monkeypatch.setattr(reader, "leave_signals_to_parent", exit_at_once)
    for part in ("train", "val"):
        message = in_a_fork(error_of, getattr(loaders_of(data), part))
        assert "ended by itself (exit code 3), before its first image (batch: class" in message


def test_H3_a_worker_killed_between_two_batches_is_reported(data):
    def kill_the_idle():
        loader = loaders_of(data).train
        list(loader)
        for pid in children():
            os.kill(pid, signal.SIGKILL)
        wait_for(lambda: not children())
        message = error_of(loader)
        assert len(list(loader)) == 6, "the next pass has new workers"
        return message

    assert "killed by SIGKILL" in in_a_fork(kill_the_idle)


# ------------------------------------------------------------------------------ a stalled worker
def read_a_fifo(path):
    def act():
        with open(path) as file:
            file.read()

    return act


@pytest.mark.parametrize("count", [0, 1, 3])
@pytest.mark.parametrize("at", [0, 7])
def test_H3_a_read_that_never_ends_is_named_in_time(data, tmp_path, monkeypatch, count, at):
    os.mkfifo(tmp_path / "fifo")
    fault(monkeypatch, read_a_fifo(tmp_path / "fifo"), at=at)
    loader = loaders_of(data, DATA__WORKERS=count).val

    def timed():
        before = time.monotonic()
        message = error_of(loader)
        return message, time.monotonic() - before, children()

    message, seconds, left = in_a_fork(timed)
    assert "has read no image for 1 s (DATA.TIMEOUT)" in message
    assert f"reading {loader.dataset.samples[at][0]} (batch: class" in message
    assert seconds < 20
    assert not left


def test_H3_the_file_of_a_stall_is_right_where_bad_images_are_replaced(data, monkeypatch):
    def read(path, *_):
        if path.endswith("class0/3.png"):
            time.sleep(99)
        raise DataError("bad")

    monkeypatch.setattr("quadmamba.data.datasets.read_image", read)
    loader = loaders_of(data, DATA__ON_ERROR="skip").train
    assert "class0/3.png (batch" in in_a_fork(error_of, loader)


def test_H3_a_worker_that_stalls_before_it_reads_is_named(data, monkeypatch):
    monkeypatch.setattr(reader, "leave_signals_to_parent", lambda: time.sleep(99))
    message = in_a_fork(error_of, loaders_of(data).train)
    assert "has read no image for 1 s (DATA.TIMEOUT), before its first image" in message


def test_H3_a_stopped_worker_is_said_to_be_stopped(data, monkeypatch):
    fault(monkeypatch, lambda: os.kill(os.getpid(), signal.SIGSTOP))
    assert "The process is stopped (kill -CONT" in in_a_fork(error_of, loaders_of(data).val)


def test_H3_pictures_for_the_log_are_read_within_the_timeout(data, tmp_path, monkeypatch):
    os.mkfifo(tmp_path / "fifo")
    fault(monkeypatch, read_a_fifo(tmp_path / "fifo"))
    val = loaders_of(data).val
    assert val.read([(0, 1), (0, 2)]).images.shape == (2, 16, 16, 3)
    assert "DATA.TIMEOUT" in in_a_fork(lambda: error_of(iter(lambda: val.read([(0, 5)]), None)))


def test_H3_a_folder_that_cannot_be_listed_in_time_is_named(data, tmp_path, monkeypatch):
    os.mkfifo(tmp_path / "fifo")
    scandir = os.scandir

    def silent(path):
        if str(path).endswith("val/class1"):
            read_a_fifo(tmp_path / "fifo")()
        return scandir(path)

    def build():
        monkeypatch.setattr(os, "scandir", silent)
        with pytest.raises(LoaderError) as caught:
            loaders_of(data)
        return str(caught.value)

    message = in_a_fork(build)
    assert f"listing {data}/val/class1 has taken 1 s (DATA.TIMEOUT)" in message


def test_H3_a_worker_that_cannot_be_killed_is_not_waited_for(data, monkeypatch):
    fault(monkeypatch, lambda: time.sleep(8))  # as one that waits for a disk in the kernel

    def read():
        monkeypatch.setattr(multiprocessing.process.BaseProcess, "kill", lambda _: None)
        return error_of(loaders_of(data).val), children()

    message, left = in_a_fork(read)
    assert "DATA.TIMEOUT" in message
    assert not left, "multiprocessing would wait for it at exit"


def test_a_slow_reader_is_no_stalled_one(data, monkeypatch):
    monkeypatch.setattr(FolderImages, "__getitem__", lambda *args: time.sleep(0.3) or READ(*args))
    for number in (0, 2):
        loader = loaders_of(data, DATA__WORKERS=number, DATA__BATCH_SIZE=6).val
        assert len(in_a_fork(lambda loader=loader: [t.tolist() for _, t in loader])) == 2


def test_a_job_that_was_suspended_goes_on(data, monkeypatch, tmp_path):
    monkeypatch.setattr(FolderImages, "__getitem__", lambda *args: time.sleep(0.3) or READ(*args))
    pids = tmp_path / "pids"

    def suspend(parent):
        wait_for(pids.exists)
        time.sleep(0.5)
        job = [parent, *map(int, pids.read_text().split())]
        for number in (signal.SIGSTOP, signal.SIGCONT):
            for pid in job:
                os.kill(pid, number)
            time.sleep(4)  # four times DATA.TIMEOUT

    def read(other):
        batches = iter(loaders_of(data).val)
        sizes = [len(next(batches)[1])]
        partial = tmp_path / "partial"
        partial.write_text(" ".join(map(str, children() - {other.pid})))
        partial.rename(pids)
        return sizes + [len(targets) for _, targets in batches]

    def whole():
        other = multiprocessing.get_context("fork").Process(target=suspend, args=(os.getpid(),))
        other.start()
        return read(other)

    assert in_a_fork(whole) == [2] * 6


# ------------------------------------------------------------------------------------- limits
def open_files():
    return len(os.listdir("/proc/self/fd"))


@pytest.mark.parametrize("spare", range(9))
def test_H3_too_few_open_files_are_an_error_or_enough(data, spare):
    def read():
        loaders = loaders_of(data)
        with limited(resource.RLIMIT_NOFILE, open_files() + spare):
            try:
                return len(list(loaders.train)), open_files()
            except DataError as error:
                return str(error), children()

    found, more = in_a_fork(read)
    assert found == 6 or ("ulimit -n" in found and not more), found


def test_H3_too_many_processes_are_an_error_that_names_the_limit(data, monkeypatch):
    def read():
        forks = itertools.count()
        fork = os.fork

        def limited_fork():
            if next(forks) == 3:
                raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))
            return fork()

        monkeypatch.setattr(os, "fork", limited_fork)
        return error_of(loaders_of(data, DATA__WORKERS=8).train), children()

    message, left = in_a_fork(read)
    assert "DATA.WORKERS: cannot start reader 4 of 8" in message
    assert "ulimit -u" in message
    assert not left


def test_H3_a_thread_that_cannot_start_is_an_error(data, monkeypatch):
    def fail(_):
        raise RuntimeError("can't start new thread")

    def read():
        loader = loaders_of(data, DATA__WORKERS=0).val
        monkeypatch.setattr(threading.Thread, "start", fail)
        with pytest.raises(LoaderError, match="cannot list .*can't start new thread"):
            loaders_of(data)
        return error_of(loader)

    assert "reader 1 of 1: can't start new thread" in in_a_fork(read)


def test_H1_too_little_memory_is_an_error_that_says_how_much(data):
    def read():
        loader = loaders_of(data, DATA__IMG_SIZE=1024, DATA__BATCH_SIZE=12).train
        with limited(resource.RLIMIT_AS, int(open("/proc/self/statm").read().split()[0]) * 4096):
            return error_of(loader)

    message = in_a_fork(read)
    assert "cannot get 189 MB of memory for 5 batches: [Errno 12]" in message
    assert "there is not enough memory" in message
    assert "DATA.WORKERS or DATA.BATCH_SIZE" in message


def test_H1_no_batch_needs_dev_shm(data, monkeypatch):
    """What a full /dev/shm does, for machines that let no test mount one."""

    def no_space(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def read():
        monkeypatch.setattr(torch.UntypedStorage, "_new_using_fd_cpu", no_space)
        monkeypatch.setattr(torch.UntypedStorage, "_share_fd_cpu_", no_space)
        monkeypatch.setattr("multiprocessing.synchronize.SemLock.__init__", no_space)
        monkeypatch.setattr("multiprocessing.resource_sharer._resource_sharer", None)
        loaders = loaders_of(data)
        return len(list(loaders.train)), len(list(loaders.val))

    assert in_a_fork(read) == (6, 6)


def test_H3_a_decoder_without_memory_is_an_error_of_the_machine(data, monkeypatch):
    def act():
        raise MemoryError("too much")

    fault(monkeypatch, act)
    for count in (0, 2):
        message = in_a_fork(error_of, loaders_of(data, DATA__WORKERS=count).val)
        assert "class0/5.png" in message
        assert message.endswith(": MemoryError: too much")


def test_an_error_of_the_program_keeps_its_traceback(data, monkeypatch):
    def act():
        raise LookupError("a fault on purpose")

    def read(count):
        with pytest.raises(RuntimeError) as caught:
            list(loaders_of(data, DATA__WORKERS=count).val)
        return str(caught.value)

    for count, at in itertools.product((0, 1, 2), (0, 5)):
        fault(monkeypatch, act, at=at)
        message = in_a_fork(read, count)
        assert "Traceback" in message
        assert "LookupError: a fault on purpose" in message


def test_a_crash_while_no_one_waits_is_told_later(data, monkeypatch, tmp_path):
    def act():
        wait_for((tmp_path / "go").exists)
        raise LookupError("a fault on purpose")

    def read():
        batches = iter(loaders_of(data, DATA__TIMEOUT=60.0).val)
        next(batches)
        (tmp_path / "go").touch()
        wait_for(lambda: len(children()) == 1)
        with pytest.raises(RuntimeError, match="LookupError: a fault on purpose"):
            list(batches)

    fault(monkeypatch, act, at=6)  # by the worker that is given the next batch
    in_a_fork(read)


# ------------------------------------------------------------------------ passes and their ends
def leave(batches):
    for _ in batches:
        break


def interrupt(batches):
    with suppress(KeyboardInterrupt):
        for _ in batches:
            raise KeyboardInterrupt


def throw(batches):
    with suppress(LookupError):
        for _ in batches:
            raise LookupError


def close(batches):
    batches = iter(batches)
    next(batches)
    batches.close()


@pytest.mark.parametrize("way", [leave, interrupt, throw, close])
def test_a_pass_that_is_left_early_leaves_no_workers(data, way):
    def read():
        loader = loaders_of(data).train
        way(loader)
        left = children()
        return left, len(list(loader))

    assert in_a_fork(read) == (set(), 6)


def test_workers_stay_for_the_next_pass_and_end_with_their_loader(data):
    def read():
        loader, found = loaders_of(data).train, []
        for _ in range(3):
            assert len(list(loader)) == 6
            found.append(children())
        del loader
        return found, children()

    (first, second, third), left = in_a_fork(read)
    assert len(first) == 2
    assert first == second == third
    assert not left


@pytest.mark.parametrize("count", [0, 2])
def test_two_passes_at_once_are_both_whole(data, count):
    def read():
        loader = loaders_of(data, DATA__WORKERS=count).val
        alone = torch.cat([images for images, _ in loader])
        pairs = list(zip(loader, loader))
        return [torch.equal(torch.cat(images), alone) for images in zip(*both(pairs))]

    def both(pairs):
        return [(a[0], b[0]) for a, b in pairs]

    assert in_a_fork(read) == [True, True]


def test_batches_in_host_memory_may_be_kept(data):
    def read():
        loader = loaders_of(data).val
        kept = torch.cat([batch.images for batch in loader.host_batches()])
        alone = torch.cat([loader.read([(0, i)]).images for i in range(len(kept))])
        return torch.equal(kept, alone), len(kept)

    assert in_a_fork(read) == (True, 12)


@pytest.mark.parametrize("stalled", [False, True])
def test_workers_die_with_a_parent_that_is_killed(data, monkeypatch, tmp_path, stalled):
    os.mkfifo(tmp_path / "fifo")
    if stalled:
        fault(monkeypatch, read_a_fifo(tmp_path / "fifo"))

    def parent(line):
        batches = iter(loaders_of(data, DATA__TIMEOUT=99.0).val)
        next(batches)
        line.send(children())
        time.sleep(99)

    ours, theirs = multiprocessing.Pipe()
    process = multiprocessing.get_context("fork").Process(target=parent, args=(theirs,))
    process.start()
    assert ours.poll(60)
    pids = ours.recv()
    process.kill()
    process.join()
    assert len(pids) == 2
    try:
        wait_for(lambda: all(map(gone, pids)))
    finally:
        for pid in pids:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


def test_a_share_that_went_silent_is_not_asked_again(tmp_path):
    cfg = load_cfg(flags={"DATA.PATH": str(tmp_path / "nowhere")})
    with pytest.raises(LoaderError, match="^stalled$"), explained(cfg, tmp_path):
        raise LoaderError("stalled")
    with pytest.raises(DataError, match="has gone during the training"), explained(cfg, tmp_path):
        raise DataError("cannot read")


@pytest.mark.parametrize("value", [0.0, -1.0, float("inf")])
def test_a_loader_may_not_wait_for_ever(value):
    with pytest.raises(ConfigError, match="DATA.TIMEOUT: expected a"):
        load_cfg(flags={"DATA.TIMEOUT": value})


def test_shared_memory_starts_at_a_page():
    slots = Slots(3, 4, 5, 2)
    assert slots.begun.ctypes.data % mmap.PAGESIZE == 0
    assert slots.images.shape == (3, 4, 5, 5, 3)
    slots.images.fill_(7)
    slots.draws[:] = 9
    slots.note(1, 3)
    assert slots.begun.tolist() == [[0, -1], [1, 3]]
    assert (slots.images == 7).all()
    assert (slots.draws == 9).all()
