"""How the processes of a run are started and meet, and what is said where they do not."""

import re
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.distributed as dist
from runs import arguments, finish, free_port, start

from quadmamba.main import main
from quadmamba.utils import meeting
from quadmamba.utils.distributed import join
from quadmamba.utils.launch import DeviceError, Place, first_host, place_from_env
from quadmamba.utils.meeting import Wait, fresh_part, open_store

TORCHRUN = {
    "RANK": "3",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "2",
    "WORLD_SIZE": "4",
    "MASTER_ADDR": "node1",
    "MASTER_PORT": "29500",
}
SLURM = {
    "SLURM_STEP_NUM_TASKS": "16",
    "SLURM_PROCID": "9",
    "SLURM_LOCALID": "1",
    "SLURM_STEP_TASKS_PER_NODE": "8(x2)",
    "SLURM_STEP_NODELIST": "gpu[07-08]",
    "SLURM_JOB_ID": "123456",
    "SLURM_STEP_ID": "2",
    "SLURM_NTASKS": "16",
}
SALLOC = {"SLURM_JOB_ID": "123456", "SLURM_NTASKS": "16", "SLURM_NNODES": "2"}


def test_the_place_is_that_of_the_launcher():
    assert place_from_env({}) == place_from_env(SALLOC) == Place()
    third = Place(3, 1, 2, 4, launched=True, host="node1", port=29500)
    assert place_from_env(TORCHRUN) == place_from_env(TORCHRUN | SLURM) == third
    port = 20000 + (123456 + 97 * 2) % 10000
    assert place_from_env(SLURM) == Place(9, 1, 8, 16, launched=True, host="gpu07", port=port)
    given = {"MASTER_ADDR": "gpu99", "MASTER_PORT": "1234"}
    assert place_from_env(SLURM | given) == Place(9, 1, 8, 16, True, "gpu99", 1234)
    assert place_from_env(TORCHRUN | {"MASTER_ADDR": "[fe80::1]"}).host == "fe80::1"


@pytest.mark.parametrize(("node", "size"), [("0", 4), ("1", 4), ("2", 3), ("3", 1), ("4", 1)])
def test_tasks_of_a_slurm_node_are_those_of_this_node(node, size):
    env = SLURM | {"SLURM_STEP_TASKS_PER_NODE": "4(x2),3,1(x2)", "SLURM_NODEID": node}
    assert place_from_env(env | {"SLURM_LOCALID": "0"}).local_size == size


@pytest.mark.parametrize(
    ("nodes", "host"),
    [
        ("node7", "node7"),
        ("a,b", "a"),
        ("n[003-005,9],login1", "n003"),
        ("n[12]", "n12"),
        ("n[1-2]-ib,x", "n1-ib"),
        ("r[1-2]n[4,5]", "r1n4"),
    ],
)
def test_first_host_of_a_list(nodes, host):
    assert first_host(nodes) == host


WRONG = {
    "no port": ({"MASTER_PORT": None}, "MASTER_PORT is not set"),
    "empty port": ({"MASTER_PORT": ""}, "MASTER_PORT is not set, or empty"),
    "port in words": ({"MASTER_PORT": "http"}, "MASTER_PORT: expected a number .* got 'http'"),
    "port with text": ({"MASTER_PORT": "29500x"}, "MASTER_PORT: expected a number"),
    "negative port": ({"MASTER_PORT": "-1"}, "MASTER_PORT: expected a number"),
    "no port at all": ({"MASTER_PORT": "0"}, "MASTER_PORT: expected a port from 1 to 65535, got 0"),
    "large port": ({"MASTER_PORT": "65536"}, "MASTER_PORT: expected a port from 1 to 65535"),
    "huge port": ({"MASTER_PORT": "9" * 5000}, "MASTER_PORT: expected a number"),
    "no address": ({"MASTER_ADDR": None}, "MASTER_ADDR is not set"),
    "blank address": ({"MASTER_ADDR": " "}, "MASTER_ADDR is not set, or empty"),
    "rank of another run": ({"RANK": "4"}, "RANK: expected a number below WORLD_SIZE 4, got 4"),
    "negative rank": ({"RANK": "-1"}, "RANK: expected a number of 0 or more .* got '-1'"),
    "fraction": ({"RANK": "1.5"}, "RANK: expected a number"),
    "empty rank": ({"RANK": ""}, "RANK is not set, or empty"),
    "no processes": (
        {"WORLD_SIZE": "0", "RANK": "0"},
        "RANK: expected a number below WORLD_SIZE 0",
    ),
    "no size": ({"WORLD_SIZE": None}, "WORLD_SIZE is not set"),
    "local rank": ({"LOCAL_RANK": "2"}, "LOCAL_RANK: expected a number below LOCAL_WORLD_SIZE 2"),
    "no local rank": ({"LOCAL_RANK": None}, "LOCAL_RANK is not set"),
    "local size": ({"LOCAL_WORLD_SIZE": "5"}, "LOCAL_WORLD_SIZE: expected at most WORLD_SIZE 4"),
}
WRONG_SLURM = {
    "rank": ({"SLURM_PROCID": "16"}, "SLURM_PROCID: expected a number below SLURM_STEP_NUM_TASKS"),
    "no rank": ({"SLURM_PROCID": None}, "SLURM_PROCID is not set"),
    "local rank": (
        {"SLURM_LOCALID": "8"},
        "SLURM_LOCALID: expected a number below SLURM_STEP_TASK",
    ),
    "tasks": ({"SLURM_STEP_TASKS_PER_NODE": "8(2)"}, "SLURM_STEP_TASKS_PER_NODE: expected tasks"),
    "size": ({"SLURM_STEP_NUM_TASKS": "x"}, "SLURM_STEP_NUM_TASKS: expected a number"),
    "port": ({"MASTER_PORT": "0x10"}, "MASTER_PORT: expected a number"),
    "large port": ({"MASTER_PORT": "70000"}, "MASTER_PORT: expected a port"),
}
CASES = [(TORCHRUN, *case) for case in WRONG.values()]
CASES += [(SLURM, *case) for case in WRONG_SLURM.values()]


@pytest.mark.parametrize(("env", "change", "message"), CASES, ids=[*WRONG, *WRONG_SLURM])
def test_C6_variables_that_cannot_be_end_with_2_and_one_message(
    monkeypatch, capsys, env, change, message
):
    for name in {**TORCHRUN, **SLURM}:
        monkeypatch.delenv(name, raising=False)
    for name, value in (env | change).items():
        if value is not None:
            monkeypatch.setenv(name, value)
    assert main(arguments("--throughput")) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ")
    assert len(err.splitlines()) == 1
    assert re.search(message, err), err
    with pytest.raises(SystemExit) as stopped:
        main(["--help"])
    assert stopped.value.code == 0


def place(rank, size, port, host="127.0.0.1"):
    return Place(rank, rank, size, size, launched=True, host=host, port=port)


def meet(where, seconds=20.0):
    wait = Wait(seconds)
    store = open_store(where, wait)
    return store, fresh_part(store, where, wait)


def meet_all(places, seconds=20.0):
    """What each of some processes gets, or its error; one thread each."""

    def attempt(where):
        try:
            return meet(where, seconds)
        except DeviceError as error:
            return error

    with ThreadPoolExecutor(len(places)) as pool:
        return list(pool.map(attempt, places))


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "::1"])
def test_ranks_meet_at_an_address(host):
    if host == "::1" and not has_ipv6():
        host = "127.0.0.1"
    port = free_port()
    (_, first), (_, second) = meet_all([place(0, 2, port, host), place(1, 2, port, host)])
    first.set("key", "value")
    assert second.get("key") == b"value"


def has_ipv6():
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        return False
    return True


def timed_out(where, seconds=1.0):
    before = time.monotonic()
    with pytest.raises(DeviceError) as caught:
        meet(where, seconds)
    assert seconds <= time.monotonic() - before < seconds + 6
    return str(caught.value)


def test_H2_a_rank_that_does_not_come_is_named_when_the_time_is_up(monkeypatch, capsys):
    monkeypatch.setattr(meeting, "_FIRST_WORD_S", 0.2)
    text = timed_out(place(0, 12, free_port()))
    assert "missing ranks 1, 2, 3, 4, 5, 6, 7, 8 and 3 more at 127.0.0.1:" in text
    assert "1 of 12 processes here" in text
    assert "rank 0 of 12 by its environment variables" in text
    assert re.search(
        r"waiting for missing ranks 1, 2.* of 1 s \(RANK_TIMEOUT\)", capsys.readouterr().err
    )


@pytest.mark.parametrize("rank", [0, 1])
def test_H2_a_host_that_does_not_exist_is_named_when_the_time_is_up(rank, monkeypatch, capsys):
    monkeypatch.setattr(meeting, "_FIRST_WORD_S", 0.2)
    port = free_port()
    text = timed_out(place(rank, 2, port, "no-such-host.invalid"))
    assert (
        f"rank {rank} found no store at MASTER_ADDR:MASTER_PORT no-such-host.invalid:{port}" in text
    )
    assert re.search("not known|resolution", text), text
    assert (
        f"waiting for the store at no-such-host.invalid:{port} (rank 0)" in capsys.readouterr().err
    )


def test_H2_a_rank_without_the_first_one_waits_for_its_store(monkeypatch, capsys):
    monkeypatch.setattr(meeting, "_FIRST_WORD_S", 0.2)
    port = free_port()
    text = timed_out(place(1, 2, port))
    assert f"no store at MASTER_ADDR:MASTER_PORT 127.0.0.1:{port}" in text
    assert "refused" in text
    assert f"waiting for the store at 127.0.0.1:{port} (rank 0)" in capsys.readouterr().err


@pytest.mark.parametrize("host", ["a..b", "x" * 300, "127.0.0.1:80"])
def test_H2_a_name_that_can_be_no_host_is_an_error_too(host):
    assert "found no store at" in timed_out(place(1, 2, free_port(), host), 0.3)


def test_H2_the_first_of_those_that_wait_tells_who_is_missing(monkeypatch, capsys):
    monkeypatch.setattr(meeting, "_FIRST_WORD_S", 0.5)
    port = free_port()
    errors = meet_all([place(rank, 4, port) for rank in (0, 2, 3)], seconds=2)
    assert all("missing ranks 1 at" in str(error) for error in errors)
    assert capsys.readouterr().err.count("waiting for missing ranks 1 at") == 1


def test_C6_a_port_in_use_is_said_at_once():
    with socket.create_server(("", 0)) as server:
        port = server.getsockname()[1]
        with pytest.raises(
            DeviceError, match=f"cannot listen on port {port}: Address already in use; "
        ):
            meet(place(0, 2, port))


def test_C6_a_program_that_is_no_store_is_not_waited_for_for_ever():
    with socket.create_server(("127.0.0.1", 0)) as server:
        threading.Thread(target=answer, args=(server,), daemon=True).start()
        port = server.getsockname()[1]
        with pytest.raises(DeviceError, match=f"no store of a run answers at .*127.0.0.1:{port}"):
            meet(place(1, 2, port), 1.0)


def answer(server):
    """Answer as another program."""
    while True:
        try:
            connection, _ = server.accept()
            connection.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n" * 4)
            connection.close()
        except OSError:
            return


def test_C6_other_numbers_of_processes_are_told_to_both():
    port = free_port()
    errors = meet_all([place(0, 2, port), place(1, 3, port)])
    for error in errors:
        assert "expected one number of processes on all ranks, got 2 on rank 0 and 3" in str(error)
    port = free_port()
    errors = meet_all([place(0, 3, port), place(1, 2, port)], seconds=1.5)
    assert "missing ranks 2" in str(errors[0])
    assert "rank 1 has WORLD_SIZE 2" in str(errors[0])
    assert "rank 0 has WORLD_SIZE 3" in str(errors[1])


def test_C6_two_processes_of_one_rank():
    store, wait = dist.HashStore(), Wait(10)
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(fresh_part, store, place(1, 3, 1), wait)
        while not store.check(["meet/name/1"]):
            time.sleep(0.01)
        store.set("meet/name/1", "another 3")
        with pytest.raises(
            DeviceError, match="expected one process of each rank, got two of rank 1"
        ):
            first.result()


def test_H1_a_group_that_needs_more_shared_memory_says_so(monkeypatch):
    """The words are NCCL's in a container with Docker's 64 MB."""

    def fail(*_, **__):
        raise RuntimeError(
            "NCCL error in: ProcessGroupNCCL.cpp:94, unhandled system error\nLast error:\nError "
            "while creating shared memory segment /dev/shm/nccl-vH9Yxq (size 9637888)"
        )

    monkeypatch.setattr("torch.distributed.init_process_group", fail)
    message = r"system error\n/dev/shm is too small.*--shm-size=1g"
    alone, cpu = place(0, 1, free_port()), torch.device("cpu")
    with pytest.raises(DeviceError, match=message), join(alone, cpu, (), timeout=20):
        pass


def test_H2_whole_runs_end_with_2_and_a_message_in_the_time_of_the_setting():
    words = ["main.py", *arguments("--throughput", "--batch-size", 2, RANK_TIMEOUT=0.1)]
    common = {"WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1"}
    srun = {"SLURM_STEP_NUM_TASKS": 2, "SLURM_PROCID": 0, "SLURM_LOCALID": 0}
    srun |= {"SLURM_STEP_TASKS_PER_NODE": 2, "MASTER_PORT": free_port()}
    alone = start(words, **common, RANK=1, LOCAL_RANK=1, MASTER_PORT=free_port())
    ends = [finish(process) for process in (alone, start(words, **srun))]
    for (code, _, err), awaited in zip(ends, ("the store at", "missing ranks 1")):
        assert code == 2, err
        assert "Traceback" not in err
        assert re.search(rf"^waiting for {awaited}.* of 6 s \(RANK_TIMEOUT\)$", err, re.MULTILINE)
        assert err.count("error: ") == 1
