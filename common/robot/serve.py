"""A trained policy on a socket, in the wire protocol of Isaac-GR00T N1.5's server: its clients connect as they are.

    uv run --extra serve python -m common.robot.serve RUN_DIR/best --port 5555

ZeroMQ REQ/REP over TCP. A message is msgpack of {"endpoint": name, "data": {…}, "api_token": optional}; endpoints are
ping, get_action (the default), get_modality_config and kill. Arrays travel as .npy bytes, never as pickles. Whatever is
wrong with a request is answered by {"error": one line}, and the server lives on. Beyond the protocol: "seed" makes
actions repeatable. A client of twenty lines, and how fast it is: docs/so101.md.
"""

import hmac
import io
import ipaddress
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import annotated_types
import numpy as np
import tyro

from common.cli import Count, Name, Text, fail, parse
from common.robot.policy import Policy

try:
    import msgpack
    import zmq
except ImportError as missing:
    fail(f"{missing.name} is not installed: uv run --extra serve python -m common.robot.serve …")

MAX_MESSAGE = 64 << 20  # bytes: ten pictures of 1080p; whoever sends more is disconnected
Port = Annotated[int, annotated_types.Interval(ge=0, le=65535)]


@dataclass
class Args:
    # policy
    model_path: tyro.conf.Positional[Text] = tyro.MISSING  # run folder, checkpoint or hub id
    device: Literal["auto", "cpu", "cuda"] = "auto"  # auto: a GPU where there is one
    denoising_steps: Count = 4  # Euler steps of a prediction, 1 to 16
    data_config: Text | None = None  # of an older folder that does not say what it sees
    embodiment_tag: Name | None = None  # whose statistics and layers; default: the checkpoint's
    tokenizer: Text | None = None  # folder or hub id; default: the checkpoint's

    # network
    host: Text = "127.0.0.1"  # address to listen at; 0.0.0.0: all of the machine, then give --api-token too
    port: Port = 5555  # TCP port; 0: a free one, which is printed
    api_token: Text | None = None  # what clients must send; default: no check


# ---- messages --------------------------------------------------------------------------------------------------------


def decoded(entry: dict) -> Any:
    """A map of a message, or the array that it stands for."""
    if "__ndarray_class__" not in entry:
        return entry
    return np.lib.format.read_array(io.BytesIO(entry["as_npy"]), allow_pickle=False)


def encoded(value: Any) -> Any:
    """What msgpack does not know."""
    if isinstance(value, np.ndarray):
        np.save(buffer := io.BytesIO(), value, allow_pickle=False)
        return {"__ndarray_class__": True, "as_npy": buffer.getvalue()}
    raise TypeError(f"a {type(value).__name__} cannot be sent")


def pack(message: Any) -> bytes:
    return msgpack.packb(message, default=encoded)


def unpack(message: bytes) -> Any:
    return msgpack.unpackb(message, object_hook=decoded)


# ---- the server ------------------------------------------------------------------------------------------------------


def answer(policy: Policy, frames: list[bytes], api_token: str | None = None) -> tuple[Any, bool]:
    """The reply to a message (its frames), and whether to go on. What is wrong with it is an exception."""
    if len(frames) != 1:
        raise ValueError(f"a request is one frame, this has {len(frames)}")
    request = unpack(frames[0])
    if not isinstance(request, dict):
        raise ValueError(f'a request is a map such as {{"endpoint": "ping"}}, not a {type(request).__name__}')
    token = request.get("api_token")
    if api_token and not (isinstance(token, str) and hmac.compare_digest(token.encode(), api_token.encode())):
        raise ValueError("Unauthorized: Invalid API token")
    match request.get("endpoint", "get_action"):
        case "ping":
            return {"status": "ok", "message": "Server is running"}, True
        case "kill":
            return {"status": "ok", "message": "Server is stopping"}, False
        case "get_action":
            return policy.get_action(request.get("data"), seed=request.get("seed")), True
        case "get_modality_config":
            entries = policy.modality_config().items()
            return {key: {"__ModalityConfig_class__": True, "as_json": json.dumps(e)} for key, e in entries}, True
        case unknown:
            raise ValueError(f"Unknown endpoint: {str(unknown)[:80]}; ping, get_action, get_modality_config, kill")


def serve(policy: Policy, socket, api_token: str | None = None, say: Callable[[str], None] = print) -> None:
    """Answers requests at a bound REP socket, one after the other, until somebody sends `kill`."""
    going = True
    while going:
        frames = socket.recv_multipart()
        try:
            reply, going = answer(policy, frames, api_token)
            reply = pack(reply)
        except (Exception, SystemExit) as error:  # nothing that a client sends ends the server
            text = " ".join(str(error).split())[:500]
            text = text if isinstance(error, ValueError) and text else f"{type(error).__name__}: {text}"
            say(f"refused: {text}")
            reply = pack({"error": text})
        socket.send(reply)


def listen(host: str, port: int):
    """A bound REP socket."""
    socket = zmq.Context().socket(zmq.REP)
    socket.setsockopt(zmq.MAXMSGSIZE, MAX_MESSAGE)
    try:
        socket.bind(f"tcp://{host}:{port}")
    except zmq.ZMQError as error:
        socket.context.destroy(linger=0)
        fail(f"--host {host} --port {port}: {error.strerror}; is another server there? --port 0 takes a free one")
    return socket


def reaches_out(host: str) -> bool:
    """Whether other machines can connect."""
    try:
        return not ipaddress.ip_address(host).is_loopback
    except ValueError:  # a name or an interface
        return host != "localhost"


def main(args: Args) -> None:
    socket = listen(args.host, args.port)
    try:
        chosen = dict(data_config=args.data_config, embodiment_tag=args.embodiment_tag, tokenizer=args.tokenizer)
        policy = Policy.from_pretrained(args.model_path, args.device, args.denoising_steps, **chosen)
        if reaches_out(args.host) and not args.api_token:
            print("note: whoever reaches this machine can ask for actions and stop the server: see --api-token")
        print(f"{args.model_path} answers at {socket.last_endpoint.decode()}; Ctrl-C stops it", flush=True)
        serve(policy, socket, args.api_token)
    except KeyboardInterrupt:
        sys.exit(0)
    finally:
        socket.context.destroy(linger=1000)  # ms: the answer to `kill` still leaves


if __name__ == "__main__":
    main(parse(Args, __doc__))
