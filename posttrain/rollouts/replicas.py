"""A pool of servers that are each other's equals: who is asked, who is left out, and who comes back.

A replica that refuses a connection, answers 5xx, stays silent for too long or turns out to serve another model is taken out; it
is tried again with growing pauses, and taken back once it serves the pool's model and really completes a prompt.
"""

import asyncio
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import httpx

from posttrain.decoding.vllm import RECORD
from posttrain.errors import UserError

FINGERPRINT = "X-Policy-Fingerprint"  # of the policy that made an answer
POLICY = "/v1/policy"
PARTS = {"fingerprint", "context", "vocab", "settings", "guidance"}  # of its answer
GUIDE = "/v1/guide"
ACCOUNT = "/v1/guide/account"
COMPLETIONS = "/v1/completions"
FIRST_PAUSE, LONGEST_PAUSE = 0.25, 10.0  # seconds before a lost replica is tried again; doubled each time
CONNECT, PROBE = 10.0, 30.0  # seconds, at most: for a connection, and for the one token of a replica that wants back
IDLE = 2.0  # seconds; shorter than servers keep idle connections, or a request would go into a closed one
START = 1800.0  # seconds, at most, that a server needs to start anew
ATTEMPTS = 20  # for one request: what brings so many replicas down would bring them all down

Json = dict[str, Any]


class Lost(Exception):
    """Why a replica did not do what it was asked; the request is as good as never sent."""


class Busy(Exception):
    """A replica that is well, but asks to be asked later."""


@dataclass
class Replica:
    """url: without a path; running: requests that it has not answered; strikes: losses since its last answer."""

    url: str
    up: bool = False
    running: int = 0
    strikes: int = 0
    trouble: str = "has not answered yet"
    stranger: Json | None = field(default=None, repr=False)  # what it serves, where that is not the pool's model

    @property
    def pause(self) -> float:
        return min(FIRST_PAUSE * 2 ** max(self.strikes - 1, 0), LONGEST_PAUSE)


class Replicas:
    """Lives in one event loop. identity: what `GET /v1/policy` must say; None: whatever the first that answers says.

    slots: requests at a time and replica; timeout: seconds for one answer; patience: seconds without any replica.
    """

    def __init__(self, urls: Iterable[str], key: str | None, slots: int, timeout: float, patience: float) -> None:
        self.replicas = [Replica(url) for url in urls]
        self.identity: Json | None = None
        self.slots = slots
        self.patience = patience
        self._timeout = httpx.Timeout(timeout, connect=min(timeout, CONNECT))
        self._probe = httpx.Timeout(min(timeout, PROBE), connect=min(timeout, CONNECT))
        self._client = httpx.AsyncClient(
            headers={"Authorization": f"Bearer {key}"} if key else {},
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=None, keepalive_expiry=IDLE),
        )
        self._changed = asyncio.Condition()
        self._watches: set[asyncio.Task[None]] = set()
        self._alone_since: float | None = None
        self._guidance: Json | None = None  # of the guide that all were started anew with

    async def open(self, grace: float = 0.0) -> None:
        """Until every replica was tried and one serves; grace: seconds more than `patience`. Errors: UserError as `complete`."""
        self._alone_since = time.monotonic() + grace
        await asyncio.gather(*map(self._try, self.replicas))
        for replica in self.replicas:
            if not replica.up:
                self._watch(replica)
        self._release(await self._take())

    async def close(self) -> None:
        for watch in self._watches:
            watch.cancel()
        await asyncio.gather(*self._watches, return_exceptions=True)
        await self._client.aclose()

    async def complete(self, body: Json) -> Json:
        """The one choice of a completion. Errors: UserError naming `url` when there is no replica for `patience` seconds, and
        for a request that a healthy replica refuses or that ATTEMPTS of them were lost over."""
        losses, pause = 0, FIRST_PAUSE
        while True:
            replica = await self._take()
            try:
                choice = await self._ask(replica, body, self._timeout)
            except Busy:
                await asyncio.sleep(pause)  # in its place: so it is asked for less
                pause = min(2 * pause, LONGEST_PAUSE)
            except Lost as lost:
                self._lose(replica, str(lost))
                losses += 1
                if losses == ATTEMPTS:
                    raise UserError(
                        f"url: a request was lost {ATTEMPTS} times, at last: {replica.url} {lost}"
                    ) from None
            else:
                replica.strikes = 0
                return choice
            finally:
                self._release(replica)
                await self._tell()

    async def replace(self, folder: str, fingerprint: str) -> None:
        """New weights for every replica, also for one that was out. Errors: UserError naming `weights` when none takes them."""
        assert self.identity is not None
        self.identity = {**self.identity, "fingerprint": fingerprint}
        await asyncio.gather(*(self._push(replica, folder) for replica in self.replicas))
        await self._tell()
        if not any(replica.up for replica in self.replicas):
            raise UserError(f"weights: no replica takes {folder}: {self._troubles()}")

    async def restart(self, folder: str, guidance: Json, settings: Json) -> None:
        """Every replica again, with this guide; what they have in common then, besides its settings, is asked anew. One that
        cannot be told stays out. Errors: UserError naming `guide` for one that is refused, and as `complete`."""
        asked = {"folder": folder, "guidance": guidance}
        untold = []
        told = await asyncio.gather(*(self._start(replica, asked) for replica in self.replicas), return_exceptions=True)
        for replica, found in zip(self.replicas, told, strict=True):
            if isinstance(found, Lost):
                untold.append(f"{replica.url} {found}")
            elif isinstance(found, BaseException):
                raise found
            elif found.get("guidance") != settings:
                raise UserError(f"guide: {replica.url} reads another one in {folder}; all must see the same files")
        if len(untold) == len(self.replicas):
            raise UserError(f"guide: no replica starts anew with it: {'; '.join(untold)}")
        self.identity, self._guidance = None, settings
        for replica in self.replicas:
            replica.up = False
        await self.open(START)

    async def _start(self, replica: Replica, asked: Json) -> Json:
        """What it will guide by."""
        answer = await self._send("POST", replica, GUIDE, self._timeout if replica.up else self._probe, asked)
        if answer.status_code == 400:
            raise UserError(f"guide: the service refuses it: {_shown(answer)}")
        if answer.status_code != 202:
            raise Lost(f"answers {_shown(answer)}")
        return _json(answer)

    async def _push(self, replica: Replica, folder: str) -> None:
        try:
            answer = await self._send("POST", replica, POLICY, self._timeout, {"folder": folder})
            if answer.status_code != 200:
                raise Lost(f"answers {_shown(answer)}")
            self._check(_json(answer))
        except Lost as lost:
            self._lose(replica, str(lost))
        else:
            if not replica.up:
                await self._try(replica)

    async def _take(self) -> Replica:
        """The replica with the fewest requests, once there is one with room."""
        async with self._changed:
            while True:
                up = [replica for replica in self.replicas if replica.up]
                if up:
                    best = min(up, key=lambda replica: replica.running)
                    if best.running < self.slots:
                        best.running += 1
                        return best
                left = None if self._alone_since is None else self._alone_since + self.patience - time.monotonic()
                if left is not None and left <= 0:
                    raise UserError(f"url: no replica serves for {self.patience:g} seconds: {self._troubles()}")
                try:
                    await asyncio.wait_for(self._changed.wait(), left)
                except TimeoutError:
                    continue

    def _release(self, replica: Replica) -> None:
        replica.running -= 1

    async def _tell(self) -> None:
        async with self._changed:
            self._changed.notify_all()

    def _troubles(self) -> str:
        return "; ".join(f"{replica.url} {replica.trouble}" for replica in self.replicas if not replica.up)

    def _lose(self, replica: Replica, trouble: str) -> None:
        replica.trouble = trouble
        if not replica.up:
            return  # another of its requests has said so
        replica.up = False
        replica.strikes += 1
        if not any(other.up for other in self.replicas):
            self._alone_since = time.monotonic()
        self._watch(replica)

    def _watch(self, replica: Replica) -> None:
        task = asyncio.create_task(self._until_back(replica))
        self._watches.add(task)
        task.add_done_callback(self._watches.discard)

    async def _until_back(self, replica: Replica) -> None:
        while not replica.up:
            await asyncio.sleep(replica.pause)
            if not replica.up:
                await self._try(replica)
        await self._tell()

    async def _try(self, replica: Replica) -> None:
        """Takes it in, if it serves this model and its engine really runs."""
        try:
            answer = await self._send("GET", replica, POLICY, self._probe)
            if answer.status_code != 200:
                raise Lost(f"answers {_shown(answer)}; is it posttrain rollout-service?")
            identity = _json(answer)
            if not identity.keys() >= PARTS:
                raise Lost("does not say what it serves; is it posttrain rollout-service?")
            replica.stranger = None
            if self._guidance not in (None, identity["guidance"]):
                raise Lost("has not started anew with the guide")
            if self.identity is None:
                self.identity = identity
            try:
                self._check(identity)
            except Lost:
                replica.stranger = identity
                raise
            await self._ask(replica, {"prompt": [0], "max_tokens": 1, "temperature": 0.0}, self._probe)
        except Busy:
            replica.trouble = "is too busy"
            replica.strikes += 1
        except (Lost, UserError) as error:
            replica.trouble = str(error)
            replica.strikes += 1
        else:
            replica.up = True
            self._alone_since = None

    def _check(self, identity: Json) -> None:
        expected = self.identity or {}
        for name in [*expected, *identity]:
            if identity.get(name) != expected.get(name):
                raise Lost(f"serves another model ({name} {identity.get(name)}, not {expected.get(name)})")

    async def _ask(self, replica: Replica, body: Json, timeout: httpx.Timeout) -> Json:
        answer = await self._send("POST", replica, COMPLETIONS, timeout, body)
        made_by = answer.headers.get(FINGERPRINT)
        expected = (self.identity or {}).get("fingerprint")
        if answer.status_code in (400, 413, 422) and made_by == expected:
            raise UserError(f"url: {replica.url} refuses a request: {_shown(answer)}")
        if answer.status_code == 429:
            raise Busy
        if answer.status_code != 200:
            raise Lost(f"answers {_shown(answer)}")
        if made_by != expected:
            raise Lost(f"serves another model (fingerprint {made_by}, not {expected})")
        try:
            [choice] = _json(answer)["choices"]
            if choice["finish_reason"] not in ("stop", "length"):  # "abort": it is being stopped
                raise Lost(f"gave a completion up ({choice['finish_reason']})")
        except (KeyError, TypeError, ValueError):
            raise Lost("answers something that is no completion") from None
        if record := body.get("vllm_xargs", {}).get(RECORD):
            asked = {"record": record, "ids": choice["token_ids"]}
            answer = await self._send("POST", replica, ACCOUNT, timeout, asked)
            if answer.status_code != 200:
                raise Lost(f"gives no account of its guidance: {_shown(answer)}")
            choice["guidance"] = _json(answer)
        return choice

    async def _send(
        self, method: str, replica: Replica, path: str, timeout: httpx.Timeout, body: Json | None = None
    ) -> httpx.Response:
        try:
            return await self._client.request(method, replica.url + path, json=body, timeout=timeout)
        except httpx.TimeoutException:
            raise Lost("does not answer in time") from None
        except httpx.HTTPError as error:
            raise Lost(f"cannot be reached ({type(error).__name__}: {error})".replace(": )", ")")) from None


def _json(answer: httpx.Response) -> Json:
    try:
        found = answer.json()
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise Lost("answers something that is no JSON object")
    return found


def _shown(answer: httpx.Response) -> str:
    return f"{answer.status_code}: {' '.join(answer.text.split())[:200]}"
