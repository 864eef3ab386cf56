"""The engine's thread on its own."""

import asyncio

import pytest

from posttrain.rollouts.engine import Completion, Request, Sampling
from posttrain.rollouts.transformers import Batch, TransformersEngine
from posttrain.serving.worker import Job, Token, Worker
from tests.small_models import build_model


def request(id, tokens, **settings):
    return Request(id, (5, 6, 7 + id), Sampling(max_tokens=tokens, seed=id, stop_ids=(100,)), **settings)


@pytest.fixture
def engine():
    return TransformersEngine(build_model("llama"), fingerprint="x", slots=2)


def run(engine, script):
    """script(worker, submit) is a coroutine; submit(request, stream) gives the list that its events go to."""

    async def main():
        worker = Worker(engine)
        worker.start(asyncio.get_running_loop())

        def submit(request, stream=True):
            heard = []
            worker.submit([Job(request, heard.append, stream)])
            return heard

        try:
            return await script(worker, submit)
        finally:
            await asyncio.to_thread(worker.stop)

    return asyncio.run(main())


async def until(true):
    async with asyncio.timeout(10):
        while not true():
            await asyncio.sleep(0.001)


def ended(heard):
    return bool(heard) and not isinstance(heard[-1], Token)


def test_tokens_come_one_by_one_and_then_the_completion(engine):
    async def script(worker, submit):
        heard, quiet = submit(request(0, 12, top_logprobs=2)), submit(request(1, 12), stream=False)
        await until(lambda: ended(heard) and ended(quiet))
        return heard, quiet

    heard, quiet = run(engine, script)
    *tokens, completion = heard
    [expected] = engine.generate([request(0, 12, top_logprobs=2)])
    assert completion.ids == expected.ids and len(quiet) == 1
    assert [(token.id, token.logprob, token.top) for token in tokens] == list(
        zip(completion.ids[:-1], completion.logprobs, completion.top_logprobs, strict=False)
    )


def test_what_joins_late_is_what_it_would_be_alone(engine):
    async def script(worker, submit):
        first = submit(request(0, 60))
        await until(lambda: len(first) > 5)
        others = [submit(request(i, 10)) for i in range(1, 6)]
        await until(lambda: all(map(ended, (first, *others))))
        return [heard[-1] for heard in (first, *others)]

    found = run(engine, script)
    alone = [next(engine.generate([request(i, 60 if i == 0 else 10)])) for i in range(6)]
    assert [completion.ids for completion in found] == [completion.ids for completion in alone]


def test_a_cancelled_request_gives_its_slot_to_the_next(engine):
    async def script(worker, submit):
        long = [submit(request(i, 250)) for i in range(2)]
        last = submit(request(2, 5))
        await until(lambda: all(long))
        worker.cancel({0, 77})
        await until(lambda: ended(last))
        return long, last

    long, last = run(engine, script)
    assert isinstance(last[-1], Completion) and not ended(long[0])


def test_a_request_cancelled_in_line_never_runs(engine):
    async def script(worker, submit):
        long = [submit(request(i, 40)) for i in range(2)]
        never = submit(request(2, 5))
        worker.cancel({2})
        await until(lambda: all(map(ended, long)))
        return never, worker.waiting

    assert run(engine, script) == ([], 0)


def test_a_broken_step_ends_what_runs_and_spares_what_waits(engine, monkeypatch):
    step, broken = Batch.step, []

    def breaking(self):
        if not broken and len(self.rows) == 2:
            broken.append(True)
            raise RuntimeError("no memory")
        return step(self)

    monkeypatch.setattr(Batch, "step", breaking)

    async def script(worker, submit):
        heard = [[] for _ in range(3)]
        worker.submit([Job(request(i, 5), heard[i].append, False) for i in range(3)])
        await until(lambda: all(map(ended, heard)))
        return heard

    *lost, kept = run(engine, script)
    assert all(isinstance(one[-1], RuntimeError) for one in lost) and isinstance(kept[-1], Completion)


def test_other_work_runs_between_steps_and_its_errors_come_back(engine):
    async def script(worker, submit):
        heard = submit(request(0, 40))
        assert await asyncio.wrap_future(worker.call(lambda: 7)) == 7
        with pytest.raises(ZeroDivisionError):
            await asyncio.wrap_future(worker.call(lambda: 1 / 0))
        await until(lambda: ended(heard))
        return heard[-1]

    assert isinstance(run(engine, script), Completion)
