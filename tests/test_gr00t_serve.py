"""The policy on a socket: the published wire protocol, requests of every wrong kind, clients that come and go."""

import io
import json
import multiprocessing
import os
import pickle
import re
import socket as tcp
import sys
import threading
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, flags_of, free_port, run_script

msgpack = pytest.importorskip("msgpack", reason="the extra `serve` is not installed")
zmq = pytest.importorskip("zmq", reason="the extra `serve` is not installed")

from common.cli import parse  # noqa: E402
from common.robot import serve  # noqa: E402

PAGE = (ROOT / "docs" / "so101.md").read_text()


def documented_client() -> type:
    """The client of the documentation, which a robot's computer runs without this repository."""
    (code,) = re.findall(r"```python\n(# client\.py.*?)```", PAGE, re.S)
    scope: dict = {}
    exec(code, scope)
    return scope["Client"]


class Echo:
    """A policy whose actions are the state; the second call of a batch of its own is never mixed up."""

    def get_action(self, observation, seed=None):
        if not isinstance(observation, dict) or "state.arm" not in observation:
            raise ValueError("the observation lacks state.arm")
        state = np.asarray(observation["state.arm"], np.float64)
        if state.shape != (1, 6) or not np.isfinite(state).all():
            raise ValueError(f"state.arm has shape {state.shape}\nnot (1, 6)")
        return {"action.arm": np.repeat(state, 16, axis=0)}

    def modality_config(self):
        return {"state": {"delta_indices": [0], "modality_keys": ["state.arm"]}}


@contextmanager
def running(policy=None, api_token=None):
    """A server in a thread; yields its port."""
    socket, said = serve.listen("127.0.0.1", 0), []
    thread = threading.Thread(target=serve.serve, args=(policy or Echo(), socket, api_token, said.append), daemon=True)
    thread.start()
    port = int(socket.last_endpoint.decode().rsplit(":", 1)[1])
    try:
        yield port
    finally:
        assert thread.is_alive()
        ask(port, serve.pack({"endpoint": "kill", "api_token": api_token}))
        thread.join(5)
        assert not thread.is_alive()
        socket.context.destroy(linger=0)


def ask(port: int, *frames: bytes, wait_ms=5000):
    """One request of raw frames, from a client of its own; the reply, unpacked."""
    client = zmq.Context.instance().socket(zmq.REQ)
    client.setsockopt(zmq.LINGER, 0)
    client.setsockopt(zmq.RCVTIMEO, wait_ms)
    client.connect(f"tcp://127.0.0.1:{port}")
    try:
        client.send_multipart(frames)
        return msgpack.unpackb(client.recv())
    finally:
        client.close()


def npy(array: np.ndarray, allow_pickle=False) -> dict:
    np.save(buffer := io.BytesIO(), array, allow_pickle=allow_pickle)
    return {"__ndarray_class__": True, "as_npy": buffer.getvalue()}


ARM = np.arange(6.0)[None]
GOOD = {"endpoint": "get_action", "data": {"state.arm": npy(ARM)}}


# ---- the protocol ----------------------------------------------------------------------------------------------------


def test_the_published_protocol_to_the_letter():
    """Bytes as Isaac-GR00T N1.5's MsgSerializer writes and reads them."""
    with running() as port:
        assert ask(port, msgpack.packb({"endpoint": "ping"})) == {"status": "ok", "message": "Server is running"}
        for request in (GOOD, {"data": GOOD["data"]}):  # get_action is the default
            reply = ask(port, msgpack.packb(request))["action.arm"]
            assert reply["__ndarray_class__"] is True and set(reply) == {"__ndarray_class__", "as_npy"}
            found = np.load(io.BytesIO(reply["as_npy"]), allow_pickle=False)
            assert (found == np.repeat(ARM, 16, axis=0)).all() and found.dtype == np.float64
        (entry,) = ask(port, msgpack.packb({"endpoint": "get_modality_config"})).values()
        assert entry["__ModalityConfig_class__"] is True
        assert json.loads(entry["as_json"]) == {"delta_indices": [0], "modality_keys": ["state.arm"]}
        assert ask(port, msgpack.packb({"endpoint": "fly"}))["error"].startswith("Unknown endpoint: fly")


def test_the_documented_client_speaks_it():
    client = documented_client()
    with running() as port:
        policy = client("127.0.0.1", port)
        assert policy.ask("ping") == {"status": "ok", "message": "Server is running"}
        assert (policy.ask("get_action", {"state.arm": ARM})["action.arm"] == np.repeat(ARM, 16, axis=0)).all()
        with pytest.raises(RuntimeError, match="lacks state.arm"):
            policy.ask("get_action", {})
        assert policy.ask("ping")["status"] == "ok"  # and goes on


def test_a_token_is_asked_for_and_compared_whole():
    with running(api_token="sesame") as port:
        for token in (
            {},
            {"api_token": "sesam"},
            {"api_token": "sesame1"},
            {"api_token": None},
            {"api_token": ["sesame"]},
        ):
            for endpoint in ("ping", "kill", "get_action", "nothing"):
                reply = ask(port, msgpack.packb({"endpoint": endpoint} | token))
                assert reply == {"error": "Unauthorized: Invalid API token"}
        assert ask(port, msgpack.packb({"endpoint": "ping", "api_token": "sesame"}))["status"] == "ok"


def test_it_listens_to_this_machine_alone_unless_told_otherwise():
    assert serve.Args.host == "127.0.0.1" and serve.Args.port == 5555
    socket = serve.listen(serve.Args.host, 0)
    assert socket.last_endpoint.startswith(b"tcp://127.0.0.1:")
    socket.context.destroy(linger=0)
    outside = [serve.reaches_out(host) for host in ("127.0.0.1", "localhost", "::1", "0.0.0.0", "192.168.1.2", "*")]
    assert outside == [False, False, False, True, True, True]


# ---- what clients do -------------------------------------------------------------------------------------------------


class Mark:
    """Unpickled, it leaves a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (Path(self.path),)


def wrong_messages(mark: Path) -> list[list[bytes]]:
    """Frames of requests that must be answered by an error."""
    evil = np.array([Mark(mark)], dtype=object)
    deep: object = 0
    for _ in range(400):
        deep = [deep]
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"shape": (10**12,), "fortran_order": False, "descr": "<f8"})
    data = [
        None,
        [],
        "x",
        {},
        {"state.arm": None},
        {"state.arm": "x"},
        {"state.arm": npy(np.zeros(6))},
        {"state.arm": npy(np.full((1, 6), np.nan))},
        {"state.arm": npy(evil, allow_pickle=True)},
        {"state.arm": {"__ndarray_class__": True}},
        {"state.arm": {"__ndarray_class__": True, "as_npy": "text"}},
        {"state.arm": {"__ndarray_class__": True, "as_npy": pickle.dumps(Mark(mark))}},
        {"state.arm": {"__ndarray_class__": True, "as_npy": b"PK\3\4" + bytes(60)}},
        {"state.arm": {"__ndarray_class__": True, "as_npy": header.getvalue()}},
        {"state.arm": {"__ndarray_class__": True, "as_npy": npy(ARM)["as_npy"][:-9]}},
        npy(ARM),
    ]
    requests = [{"endpoint": "get_action", "data": x} for x in data]
    requests += [{"endpoint": x} for x in ("", "fly", 3, None, [], {}, "__class__", "x" * 10_000)]
    requests += [None, 3, "ping", [], [{"endpoint": "ping"}], npy(ARM), {3: 4}, {"endpoint": {"a": deep}}]
    frames = [[msgpack.packb(request)] for request in requests]
    frames += [[b""], [b"\xc1"], [b"\xdd\xff\xff\xff\xff"], [pickle.dumps(Mark(mark))], [b"{}"], [bytes(10_000)]]
    ping = msgpack.packb({"endpoint": "ping"})
    return frames + [[ping, ping], [b"", ping], [ping, b""], [ping + b"\0"], [b"\x91" * 5000], [b"\x81\xa1a" * 2000]]


def test_a_thousand_messages_of_every_wrong_kind_are_answered_and_none_ends_the_server(tmp_path):
    rng, mark = np.random.default_rng(0), tmp_path / "mark"
    wrong, good = wrong_messages(mark), msgpack.packb(GOOD)
    errors = 0
    with running() as port:
        client = zmq.Context.instance().socket(zmq.REQ)
        client.setsockopt(zmq.RCVTIMEO, 5000)
        client.setsockopt(zmq.LINGER, 0)
        client.connect(f"tcp://127.0.0.1:{port}")
        for n in range(1000):
            must_fail = n < len(wrong)
            if must_fail:
                frames = wrong[n]
            elif n % 3 == 0:  # noise
                frames = [rng.bytes(int(rng.integers(0, 200)))]
            else:  # a good one with bytes changed, cut or doubled
                message = bytearray(good)
                for _ in range(rng.integers(1, 4)):
                    message[rng.integers(len(message))] = rng.integers(256)
                frames = [bytes(message[: rng.integers(1, len(message))] if n % 3 == 1 else message)]
            client.send_multipart(frames)
            reply = msgpack.unpackb(client.recv())
            assert isinstance(reply, dict)
            if "error" in reply:
                errors += 1
                assert set(reply) == {"error"} and "\n" not in reply["error"] and 0 < len(reply["error"]) <= 600
            assert not must_fail or "error" in reply, frames
        client.close()
        assert errors > 900 and not mark.exists()
        assert ask(port, good)["action.arm"]["__ndarray_class__"]


def test_clients_that_vanish_or_do_not_speak_zeromq_disturb_nobody():
    with running() as port:
        for n in range(20):
            client = zmq.Context.instance().socket(zmq.REQ)
            client.connect(f"tcp://127.0.0.1:{port}")
            client.send(msgpack.packb(GOOD))
            client.close(linger=0 if n % 2 else 200)  # before or after its request has left
            with tcp.create_connection(("127.0.0.1", port)) as raw:
                raw.sendall([b"GET / HTTP/1.1\r\n\r\n", b"\xff" + bytes(9) + b"\x7f\3", os.urandom(100), b""][n % 4])
        assert ask(port, msgpack.packb(GOOD))["action.arm"]


def test_two_clients_at_once_get_their_own_answers():
    wrong = []

    def work(port: int, who: int) -> None:
        policy = documented_client()("127.0.0.1", port)
        for n in range(100):
            state = np.full((1, 6), 1000.0 * who + n)
            if (policy.ask("get_action", {"state.arm": state})["action.arm"] != state).any():
                wrong.append((who, n))

    with running() as port:
        threads = [threading.Thread(target=work, args=(port, who)) for who in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
        assert wrong == [] and not any(thread.is_alive() for thread in threads)


def test_a_policy_that_breaks_is_an_error_and_not_the_end():
    class Broken(Echo):
        def get_action(self, observation, seed=None):
            {"exit": lambda: sys.exit(2), "memory": lambda: [][1], "value": lambda: {"a": object()}}[observation]()
            return {"a": object()}

    with running(Broken()) as port:
        for kind, message in (("exit", "SystemExit"), ("memory", "IndexError"), ("value", "TypeError: a object")):
            assert ask(port, msgpack.packb({"data": kind}))["error"].startswith(message)


# ---- from the command line to a robot --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "flags, message",
    [
        (["nowhere"], "nowhere"),
        (["assets/tiny-qwen2"], "assets/tiny-qwen2"),
        ([], "required"),
        (["x", "--port", "-1"], "--port"),
        (["x", "--port", "65536"], "--port"),
        (["x", "--port", "TAKEN"], "--port 0 takes a free one"),
        (["x", "--host", "no.such.host.example"], "--host"),
        (["x", "--host", ""], "--host"),
        (["x", "--denoising-steps", "0"], "--denoising-steps"),
    ],
)
def test_what_cannot_be_served_ends_in_one_line(flags, message, monkeypatch, capsys):
    with tcp.create_server(("127.0.0.1", 0)) as taken:
        flags = [str(taken.getsockname()[1]) if flag == "TAKEN" else flag for flag in flags]
        flags = flags if "--port" in flags else [*flags, "--port", "0"]
        monkeypatch.chdir(ROOT)
        assert run_script(serve, ["serve", *flags], monkeypatch) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1 and error.startswith("error: ")


@pytest.mark.parametrize("name", ["zmq", "msgpack"])
def test_a_missing_extra_is_named(name, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(SystemExit):
        exec((ROOT / "common/robot/serve.py").read_text(), {"__name__": "common.robot.serve"})
    assert capsys.readouterr().err == (
        f"error: {name} is not installed: uv run --extra serve python -m common.robot.serve …\n"
    )


def test_a_robot_moves_the_same_through_the_socket(tmp_path, monkeypatch):
    """A model trained for a moment, served by a process of its own, drives FetchReach by the documented client."""
    import gr00t_finetune as g
    from common.robot.fetch import FetchVec
    from common.robot.fetch_robot import STATE, slices, state_vector
    from common.robot.policy import Policy
    from common.run import Run

    monkeypatch.setattr(g, "draw_open_loop", lambda *given: None)
    monkeypatch.setattr(Run, "finish", lambda run, text: None)  # no figures
    flags = dict(model_path="lite", max_steps=20, batch_size=32, eval_trajs=1, eval_batches=1, denoising_sweep=(4,))
    flags |= dict(closed_loop=False, torch_threads=1, device="cpu", output_dir=str(tmp_path))
    assert run_script(g, ["gr00t_finetune.py", *flags_of(**flags)], monkeypatch) == 0
    (run,) = (tmp_path / "gr00t_finetune").iterdir()
    port, threads = free_port(), torch.get_num_threads()

    def start() -> None:
        sys.argv = ["serve", str(run / "best"), "--port", port, "--device", "cpu"]
        serve.main(parse(serve.Args, ""))

    torch.set_num_threads(1)
    server = multiprocessing.get_context("fork").Process(target=start, daemon=True)
    server.start()
    try:
        client, policy = documented_client()("127.0.0.1", port), Policy.from_pretrained(run, device="cpu")
        config = client.ask("get_modality_config")
        assert config == policy.modality_config()
        keys = {name.removeprefix("state.") for name in config["state"]["modality_keys"]}
        places = {key: slice(at["start"], at["end"]) for key, at in slices(STATE).items() if key in keys}
        language = config["language"]["modality_keys"][0]
        played = []
        for get_action in (client.get_action, policy.get_action):
            envs, taken = FetchVec("FetchReach-v4", 4, 1), []
            obs, _ = envs.reset(seed=0)
            for step in range(envs.max_episode_steps):
                if step % 8 == 0:
                    state = state_vector(obs)[:, None].astype(np.float64)  # (N, 1, D)
                    look = {f"state.{key}": state[..., place] for key, place in places.items()}
                    chunk = get_action(look | {language: ["reach the target"] * 4}, seed=step)
                    chunk = np.concatenate([chunk[name] for name in config["action"]["modality_keys"]], axis=-1)
                    assert chunk.shape == (4, 16, 4)
                taken.append(chunk[:, step % 8].astype(np.float32))
                obs, _, _, dones, infos = envs.step(taken[-1])
            assert dones.all()
            played.append((np.array(taken), infos["final_info"]["is_success"]))
            envs.close()
        assert (played[0][0] == played[1][0]).all() and (played[0][1] == played[1][1]).all()
        assert client.ask("kill")["status"] == "ok"
        server.join(10)
        assert server.exitcode == 0
    finally:
        server.kill()
        torch.set_num_threads(threads)
