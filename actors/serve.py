"""The `serve` stage: a chat model behind HTTP on Ray Serve, until Ctrl-C.

One deployment holds the API and the engine: every further hop would cost each token a message between processes.
"""

from __future__ import annotations

import errno
import logging
import socket
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import PurePosixPath
from typing import Any

import ray
from fastapi import FastAPI
from ray import serve
from ray.exceptions import TaskCancelledError
from ray.serve.config import HTTPOptions, ProxyLocation
from ray.serve.schema import ApplicationStatus, ApplicationStatusOverview, LoggingConfig

from actors import cluster
from actors.chat_api import ChatModel, build_app
from rayllm.config.chat_schema import ServeConfig
from rayllm.engine.async_engine import AsyncEngine
from rayllm.engine.calculator import calculate
from rayllm.engine.engine import Engine
from rayllm.engine.reply import open_chat_checkpoint
from rayllm.runs.checkpoint import Checkpoint
from rayllm.runs.load import load, load_tokenizer, model_config
from rayllm.runtime import build_runtime

APP_NAME = "rayllm"
PLACEMENT_TIMEOUT_S = 600.0
START_TIMEOUT_S = 600.0
ANSWER_TIMEOUT_S = 60.0
WATCH_EVERY_S = 5.0
# Requests that one replica takes besides those that write or wait: health checks, the page, refusals.
SPARE_REQUESTS = 64


class ChatReplica:
    """One copy of the model with its engine; Ray Serve asks it for the web application."""

    def __init__(self, config: ServeConfig, model_name: str) -> None:
        logging.getLogger("asyncio").addFilter(_is_no_cancellation)
        runtime = build_runtime(config.device, config.dtype)
        model, tokenizer = load(config.checkpoint, runtime.device, runtime.dtype)
        model.lay_out_for_inference()
        context_len = model.config.sequence_len

        def build_engine() -> Engine:
            return Engine(
                model,
                tokenizer,
                num_slots=config.num_slots,
                num_prompts=2 * config.num_slots,  # what runs, and conversations that may go on
                max_len=context_len,
                calculator=calculate,
            )

        engine = AsyncEngine(build_engine, num_slots=config.num_slots, max_waiting=config.max_waiting)
        self._served = ChatModel(model_name, tokenizer, context_len, config.sampling, engine)

    def __serve_build_asgi_app__(self) -> FastAPI:
        return build_app(self._served)

    def check_health(self) -> None:
        """Called by Ray Serve now and then, which replaces a replica that raises."""
        if not self._served.engine.is_running:
            raise RuntimeError("the engine has stopped")


def run(config: ServeConfig) -> None:
    """Serve `config.checkpoint` until interrupted.

    Raises ValueError or FileNotFoundError, before anything starts, for a model that cannot chat, a port that is taken
    or an address that is not ours.
    """
    with serving(config) as url:
        print(f"serve: chat page {url}/  API {url}/v1  (Ctrl-C stops)", flush=True)
        _watch()


@contextmanager
def serving(config: ServeConfig) -> Iterator[str]:
    """Serve while the block runs; yields the URL once the model answers there."""
    checkpoint = open_chat_checkpoint(config.checkpoint)
    model_config(checkpoint)
    load_tokenizer(checkpoint)
    check_address(config.host, config.port)
    name = config.model_name or run_name(checkpoint)
    # Replicas may start elsewhere or anew much later: they are told this very checkpoint, not "the newest".
    config = replace(config, checkpoint=checkpoint.address)
    is_guest = ray.is_initialized()
    with cluster.connect() as ray_cluster:
        config, resources = plan_placement(config, ray_cluster)
        if serve.status().applications:
            raise ValueError("this cluster serves an application already: stop it first (`serve shutdown`)")
        url = f"http://{_reachable(config.host)}:{config.port}"
        print(f"serve: loading {checkpoint} as {name!r} ...", file=sys.stderr)
        try:
            _start(config, name, resources)
            _wait_until_it_answers(f"{url}/health")
            yield url
        finally:
            print("serve: stopping ...", file=sys.stderr)
            if is_guest or not ray_cluster.is_own:  # else the whole Ray is stopped next
                serve.shutdown()  # waits 30 s at most


def run_name(checkpoint: Checkpoint) -> str:
    """The name of the run directory that a checkpoint lies in: .../rl/checkpoints/step_000060 is `rl`."""
    path = checkpoint.path.resolve() if checkpoint.url is None else PurePosixPath(checkpoint.url)
    return path.parent.parent.name if path.parent.name == "checkpoints" else path.name


def check_address(host: str, port: int) -> None:
    """Raise ValueError where the address cannot be listened on, with what to do about it."""
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # a server that just ended is no obstacle
            probe.bind(address)
    except socket.gaierror as error:
        raise ValueError(f"host={host!r} is no address: give one of this machine, such as 127.0.0.1") from error
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            message = f"port {port} of {host} is taken by another program: stop that, or choose another: --port=PORT"
        elif error.errno == errno.EACCES:
            message = f"port {port} is for the system's own services: choose one from 1024 on, with --port=PORT"
        else:
            message = f"cannot listen on {host}:{port} ({error.strerror}): is --host an address of this machine?"
        raise ValueError(message) from error


def plan_placement(config: ServeConfig, ray_cluster: cluster.Cluster) -> tuple[ServeConfig, dict[str, float]]:
    """The config with its device decided, and the resources of each replica; waits for a growing cluster."""
    num_cpus, num_gpus, num_replicas = ray_cluster.count("CPU"), ray_cluster.count("GPU"), config.num_replicas
    use_gpu = config.device == "cuda" or (config.device == "auto" and num_gpus >= num_replicas)
    if ray_cluster.is_own and (num_gpus if use_gpu else num_cpus) < num_replicas:
        have = f"{num_gpus} GPUs" if use_gpu else f"{num_cpus} CPUs"
        raise ValueError(f"{num_replicas} replicas need one each and this machine has {have}: lower --num_replicas")
    # On our own machine the replicas share all cores; on another's cluster each takes what it must have.
    cpus = num_cpus // num_replicas if ray_cluster.is_own and not use_gpu else 1
    resources = {"CPU": float(cpus)} | ({"GPU": 1.0} if use_gpu else {})
    ray_cluster.wait_for_room([resources] * num_replicas, PLACEMENT_TIMEOUT_S)
    return replace(config, device="cuda" if use_gpu else "cpu"), resources


def _start(config: ServeConfig, name: str, resources: dict[str, float]) -> None:
    """Deploy, and return when every replica has loaded the model; RuntimeError when one cannot."""
    logging.getLogger("ray.serve").setLevel(logging.ERROR)
    quiet = LoggingConfig(log_level="ERROR", enable_access_log=False)
    serve.start(
        proxy_location=ProxyLocation.HeadOnly,
        http_options=HTTPOptions(host=config.host, port=config.port),
        logging_config=quiet,
    )
    deployment = ChatDeployment.options(
        num_replicas=config.num_replicas,
        max_ongoing_requests=config.num_slots + config.max_waiting + SPARE_REQUESTS,
        ray_actor_options={"num_cpus": resources["CPU"], "num_gpus": resources.get("GPU", 0.0)},
        logging_config=quiet,
    )
    serve.run_many(
        [serve.RunTarget(deployment.bind(config, name), name=APP_NAME, route_prefix="/", logging_config=quiet)],
        wait_for_applications_running=False,
    )
    deadline = time.monotonic() + START_TIMEOUT_S
    while (app := _app_status()) is None or app.status != ApplicationStatus.RUNNING:
        if app is not None and app.status == ApplicationStatus.DEPLOY_FAILED:
            raise RuntimeError(f"the model cannot be served: {_reason(app)}")
        if time.monotonic() > deadline:
            raise TimeoutError(f"the model is not ready after {START_TIMEOUT_S:.0f} s")
        time.sleep(0.2)


def _wait_until_it_answers(url: str) -> None:
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # whatever proxy the environment names
    deadline = time.monotonic() + ANSWER_TIMEOUT_S
    while True:
        try:
            with direct.open(url, timeout=10.0):
                return
        except (urllib.error.URLError, TimeoutError) as error:
            if time.monotonic() > deadline:
                raise TimeoutError(f"no answer from {url}: {error}") from error
        time.sleep(0.1)


def _watch() -> None:
    """Stay until interrupted; say so when the application changes its state, as when a replica is replaced."""
    known: str = ApplicationStatus.RUNNING
    while True:
        time.sleep(WATCH_EVERY_S)
        app = _app_status()
        state = "gone" if app is None else str(app.status.value)
        if state != known:
            print(f"serve: {state}{f' ({_reason(app)})' if app and state != 'RUNNING' else ''}", file=sys.stderr)
            known = state


def _app_status() -> ApplicationStatusOverview | None:
    return serve.status().applications.get(APP_NAME)


def _reason(app: ApplicationStatusOverview) -> str:
    told = [app.message, *(deployment.message for deployment in app.deployments.values())]
    return " ".join(message.strip() for message in told if message.strip()) or "no reason was given"


def _reachable(host: str) -> str:
    """Where to reach, from this machine, a server that listens on `host`."""
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"[{host}]" if ":" in host else host


def _is_no_cancellation(record: logging.LogRecord) -> bool:
    """Drop what asyncio says of the future that Ray Serve leaves behind whenever a client goes away."""
    return not (record.exc_info and isinstance(record.exc_info[1], TaskCancelledError))


ChatDeployment: Any = serve.deployment(name="chat", max_constructor_retry_count=2)(serve.ingress()(ChatReplica))
