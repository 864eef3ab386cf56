"""The engine on a service, against stand-ins for its replicas: what it gives, and what it survives."""

import signal
import threading
import time
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from posttrain.decoding.guidance import Guidance
from posttrain.errors import UserError
from posttrain.models.load import model_fingerprint
from posttrain.rewards.math import Grade
from posttrain.rollouts import replicas
from posttrain.rollouts.collect import Prompt, collect
from posttrain.rollouts.engine import Request, Sampling
from posttrain.rollouts.service import ServiceEngine, service_urls
from tests.rollouts.fake_replica import drawn
from tests.rollouts.fakes import PRINT, Fake


@pytest.fixture
def fake():
    started = []

    def make(delay=0.0):
        started.append(Fake(delay))
        return started[-1]

    yield make
    for one in started:
        one.kill()


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    monkeypatch.setattr(replicas, "FIRST_PAUSE", 0.05)
    monkeypatch.setattr(replicas, "LONGEST_PAUSE", 0.2)


def requests(count, max_tokens=8):
    return [Request(i, (5 + i % 50, 6, 7), Sampling(max_tokens=max_tokens, seed=i)) for i in range(count)]


def check_all(completions, asked):
    """Every request once, with what a replica would have given undisturbed."""
    assert sorted(one.request_id for one in completions) == [request.id for request in asked]
    for one in completions:
        request = asked[one.request_id]
        ids, logprobs, reason = drawn(list(request.prompt_ids), request.sampling.seed, request.sampling.max_tokens)
        assert (list(one.ids), list(one.logprobs), one.finish_reason) == (ids, logprobs, reason)


def until(true, seconds=20):
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.01)


def meanwhile(work):
    thread = threading.Thread(target=work)
    thread.start()
    return thread


@pytest.mark.slow
def test_every_request_is_completed_once_and_load_is_shared(fake):
    pair = [fake(0.01), fake(0.01)]
    asked = requests(120)
    with ServiceEngine([one.url for one in pair], slots=4, key="secret") as engine:
        assert (engine.fingerprint, engine.context) == (PRINT, 512)
        assert engine.settings == {"engine": "service", "dtype": "float32"}
        check_all(list(engine.generate(asked)), asked)
    for one in pair:
        state = one.state
        assert state["served"] >= 30 and 2 <= state["most"] <= 4 and state["authorization"] == "Bearer secret"


def test_an_abandoned_call_stops_asking(fake):
    one = fake(0.02)
    with ServiceEngine([one.url], slots=2) as engine:
        abandoned = engine.generate(requests(200))
        next(abandoned)
        abandoned.close()
        until(lambda: one.state["running"] == 0)
        assert one.state["served"] < 20
        asked = requests(5)
        check_all(list(engine.generate(asked)), asked)


def table(urls, out, disturb=lambda: None):
    """125 prompts, 4 samples each, in one shard."""
    tokenizer = SimpleNamespace(decode=lambda ids, skip_special_tokens: " ".join(map(str, ids)))
    prompts = [Prompt(f"p{i}", [{"role": "user", "content": str(i)}], (5 + i % 90, 6, 7), "1") for i in range(125)]
    with ServiceEngine(urls, slots=4, timeout=20, patience=20) as engine:
        thread = meanwhile(disturb)
        found = collect(
            engine,
            tokenizer,
            prompts,
            samples=4,
            sampling=Sampling(max_tokens=8),
            out=out,
            policy="fake",
            shard_prompts=125,
            grader=lambda completions, golds: [Grade("different", None, "none") for _ in golds],
            progress=False,
        )
        thread.join()
    return found


@pytest.mark.slow
def test_a_replica_killed_in_the_middle_and_restarted_changes_no_row(fake, tmp_path):
    calm = fake()
    undisturbed = table([calm.url], tmp_path / "undisturbed")
    left, right = fake(0.03), fake(0.03)

    def disturb():
        until(lambda: right.state["served"] >= 50)
        right.kill()
        time.sleep(0.3)
        right.start()

    disturbed = table([left.url, right.url], tmp_path / "disturbed", disturb)
    assert right.state["served"] > 0, "it never came back"
    assert list(disturbed.rows()) == list(undisturbed.rows())
    assert len(disturbed) == 500


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["error", "abort", "other"])
def test_a_replica_that_goes_wrong_is_left_out_until_it_is_well(fake, mode):
    well, ill = fake(0.02), fake(0.02)
    asked = requests(600)
    with ServiceEngine([well.url, ill.url], slots=4, patience=20) as engine:
        completions = engine.generate(asked)
        found = [next(completions) for _ in range(20)]
        ill.tell(mode=mode)
        before = ill.state["served"]
        found += [next(completions) for _ in range(80)]
        # Those that had begun, at most: an answer by another model was made, but is not taken.
        assert ill.state["served"] <= before + 8
        ill.tell(mode="ok")
        found += list(completions)
        check_all(found, asked)
        assert ill.state["served"] > before + 8


@pytest.mark.slow
def test_a_silent_replica_is_left_out(fake):
    well, ill = fake(0.01), fake(0.01)
    asked = requests(100)
    with ServiceEngine([well.url, ill.url], slots=4, timeout=0.5, patience=20) as engine:
        completions = engine.generate(asked)
        found = [next(completions) for _ in range(10)]
        ill.tell(mode="hang")
        check_all(found + list(completions), asked)


@pytest.mark.slow
def test_a_busy_replica_is_asked_again(fake):
    one = fake()
    asked = requests(100)
    with ServiceEngine([one.url], slots=4) as engine:
        one.tell(mode="busy")
        check_all(list(engine.generate(asked)), asked)


@pytest.mark.slow
def test_a_cut_network_is_waited_for(fake):
    pair = [fake(0.02), fake(0.02)]
    asked = requests(200)

    def cut():
        until(lambda: pair[0].state["served"] >= 20)
        for one in pair:
            one.kill()
        time.sleep(1)
        for one in pair:
            one.start()

    with ServiceEngine([one.url for one in pair], slots=4, patience=20) as engine:
        thread = meanwhile(cut)
        check_all(list(engine.generate(asked)), asked)
        thread.join()


@pytest.mark.slow
def test_a_network_that_swallows_everything_for_twenty_seconds_is_waited_for(fake):
    """Connections stand, and nothing comes: as of processes that are stopped."""
    pair = [fake(0.02), fake(0.02)]
    asked = requests(200)

    def cut():
        until(lambda: pair[0].state["served"] >= 20)
        for one in pair:
            one.process.send_signal(signal.SIGSTOP)
        time.sleep(20)
        for one in pair:
            one.process.send_signal(signal.SIGCONT)

    with ServiceEngine([one.url for one in pair], slots=4, timeout=3, patience=60) as engine:
        thread = meanwhile(cut)
        check_all(list(engine.generate(asked)), asked)
        thread.join()


@pytest.mark.slow
def test_no_replica_for_too_long_is_one_error(fake):
    one = fake(0.02)
    with ServiceEngine([one.url], slots=4, patience=0.5) as engine:
        completions = engine.generate(requests(600))
        next(completions)
        one.tell(mode="other")
        with pytest.raises(UserError, match="^url: no replica serves for 0.5 seconds: .* serves another model"):
            list(completions)


@pytest.mark.slow
def test_a_replica_that_comes_back_with_another_model_is_not_taken_back(fake):
    well, changed = fake(0.01), fake(0.01)
    asked = requests(100)
    with ServiceEngine([well.url, changed.url], slots=4, patience=20) as engine:
        changed.kill()
        changed.start("another")
        check_all(list(engine.generate(asked)), asked)
        assert changed.state["served"] <= 4  # what was asked before it was known; its answers are not taken


def test_different_models_are_refused_at_once(fake):
    one, other = fake(), fake()
    other.tell(mode="other")
    with pytest.raises(UserError, match="^url: .* serves another model .fingerprint .*all must serve the same"):
        ServiceEngine([one.url, other.url])
    with pytest.raises(UserError, match="^model: .* serves ffffffff"):
        ServiceEngine([one.url], fingerprint="e" * 64)


@pytest.mark.slow
def test_a_service_that_is_not_there_yet_is_waited_for_and_not_forever(fake):
    one = fake()
    one.kill()
    with pytest.raises(UserError, match="^url: no replica serves for 0.3 seconds: .* cannot be reached"):
        ServiceEngine([one.url], patience=0.3)
    thread = meanwhile(lambda: (time.sleep(0.3), one.start()))
    with ServiceEngine([one.url], patience=20) as engine:
        asked = requests(5)
        check_all(list(engine.generate(asked)), asked)
    thread.join()


def test_a_refused_request_ends_the_run(fake):
    one = fake()
    with ServiceEngine([one.url]) as engine:
        one.tell(mode="refuse")
        with pytest.raises(UserError, match="^url: .* refuses a request: 400"):
            list(engine.generate(requests(3)))


@pytest.mark.slow
def test_new_weights_reach_every_replica_and_one_that_does_not_take_them_is_left_out(fake, tmp_path):
    pair = [fake(0.01), fake(0.01)]
    for name in "abc":
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(f'{{"name": "{name}"}}')
        (tmp_path / name / "model.safetensors").touch()
    asked = requests(100)
    with ServiceEngine([one.url for one in pair], slots=4, patience=1) as engine:
        engine.sync_weights(tmp_path / "a")
        assert engine.fingerprint == model_fingerprint(tmp_path / "a") == pair[0].state["fingerprint"]
        check_all(list(engine.generate(asked)), asked)
        assert min(one.state["served"] for one in pair) >= 10
        pair[1].tell(mode="deaf", served=0)
        engine.sync_weights(tmp_path / "b")
        check_all(list(engine.generate(asked)), asked)
        assert pair[1].state["served"] == 0
        pair[0].tell(mode="deaf")
        with pytest.raises(UserError, match="^weights: no replica takes .* serves another model"):
            engine.sync_weights(tmp_path / "c")


def test_another_process_follows_a_push(fake, tmp_path):
    one = fake()
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").touch()
    asked = requests(5)
    with ServiceEngine([one.url]) as first, ServiceEngine([one.url], patience=0.5) as second:
        first.sync_weights(tmp_path)
        second.follow(first.fingerprint)
        check_all(list(second.generate(asked)), asked)


def guided_by(name):
    settings = {"folder": f"/guides/{name}", **asdict(Guidance())}
    return SimpleNamespace(folder=Path(f"/guides/{name}"), guidance=Guidance(), settings=settings)


@pytest.mark.slow
def test_replicas_start_anew_with_a_guide_and_give_account_of_it(fake):
    pair = [fake(), fake()]
    asked = [replace(one, beta=0.1 if one.id % 2 else None) for one in requests(20)]
    with ServiceEngine([one.url for one in pair], slots=4, patience=20) as engine:
        with pytest.raises(UserError, match="^beta: this engine has no guide"):
            engine.generate(asked)
        for unasked in ({"top_logprobs": 2}, {"explain": True}):
            with pytest.raises(UserError, match=f"^{next(iter(unasked))}: a service tells the sampled tokens alone"):
                engine.generate([replace(asked[0], **unasked)])
        with pytest.raises(
            UserError, match="^guide: the service has none; start it with --guide /guides/a --guidance "
        ):
            engine.use_guide(guided_by("a"), restart=False)
        with pytest.raises(UserError, match="^guide: the service refuses it: 400: .*it is bad"):
            engine.use_guide(guided_by("bad"), restart=True)
        engine.use_guide(guided_by("a"), restart=True)
        assert engine.settings["guidance"] == guided_by("a").settings
        found = list(engine.generate(asked))
        for one in found:
            guided = one.request_id % 2 == 1
            assert one.kl == (len(one.ids) if guided else 0)
            assert one.log_ratio == (sum(one.logprobs) + 2 * len(one.ids) if guided else 0)
        check_all(found, asked)
        with ServiceEngine([pair[0].url], slots=4) as beside:
            beside.use_guide(guided_by("a"), restart=False)
            with pytest.raises(UserError, match="^guide: the service has another"):
                beside.use_guide(guided_by("b"), restart=False)


@pytest.mark.slow
def test_a_guide_reaches_a_replica_that_was_out_and_what_it_does_not_reach_stays_out(fake):
    """Also where that one is the first to answer: who was told is at work on it."""
    well, ill, old = fake(0.01), fake(0.01), fake(0.01)
    asked = [replace(one, beta=0.1) for one in requests(300)]
    with ServiceEngine([one.url for one in (well, ill, old)], slots=4, patience=20) as engine:
        ill.tell(mode="error")
        old.tell(mode="old")
        list(engine.generate(requests(40)))
        engine.use_guide(guided_by("a"), restart=True)
        assert engine.settings["guidance"] == ill.state["guidance"] == guided_by("a").settings
        for one in (ill, old):
            one.tell(mode="ok", served=0)
        check_all(list(engine.generate(asked)), asked)
        assert ill.state["served"] > 0 and old.state["served"] == 0


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mode", "message"),
    [
        ("old", "^guide: no replica starts anew with it: http://.* answers 404: .*no such path"),
        ("elsewhere", "^guide: http://.* reads another one in /guides/a; all must see the same files"),
    ],
)
def test_a_guide_that_no_replica_takes_is_told_at_once(fake, mode, message):
    one = fake()
    with ServiceEngine([one.url], slots=4, patience=20) as engine:
        one.tell(mode=mode)
        with pytest.raises(UserError, match=message):
            engine.use_guide(guided_by("a"), restart=True)


@pytest.mark.parametrize(
    ("urls", "message"),
    [
        ([], "url: give at least one"),
        (["127.0.0.1:8000"], "url: must be like http://"),
        (["http://a:x"], "url: must be like http://"),
        (["http://a:8000", "http://a:8000/v1/"], "url: names one twice"),
    ],
)
def test_urls_that_are_none_are_refused(urls, message):
    with pytest.raises(UserError, match=message):
        service_urls(urls)


def test_what_cannot_be_asked_is_refused_before_anything_is(fake):
    one = fake()
    with ServiceEngine([one.url]) as engine:
        for request, message in (
            (Request(0, (5,) * 500, Sampling(max_tokens=20)), "max_tokens: "),
            (Request(0, (5,), Sampling(max_tokens=5), beta=0.1), "beta: "),
            (Request(0, (101,), Sampling(max_tokens=5)), "prompt: "),
        ):
            with pytest.raises(UserError, match=message):
                engine.generate([request])
    assert one.state["served"] == 0
