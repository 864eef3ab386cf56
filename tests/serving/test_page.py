"""The web page, in a real browser, and how it is served.

POSTTRAIN_SCREENSHOT=docs/serve.png makes the README's picture, of the guide and the probe in the folder POSTTRAIN_SHOWN.
"""

import json
import os
from pathlib import Path

import httpx
import pytest

from posttrain.serving.catalogue import Catalogue
from tests.browser import CHROMIUM, browser
from tests.serving.conftest import KEY, serving, wait_until

in_browser = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium")


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    with browser(tmp_path_factory.mktemp("browser")) as page:
        yield page


@pytest.fixture
def opened(page):
    """Opens a server's page; afterwards nothing was complained of but what the test took out."""

    def open(url):
        page.renew()
        page.open(url)
        return page

    yield open
    assert page.complaints == []


def ask(page, question="23+48-17=?", **fields):
    for name, value in {"question": question, **fields}.items():
        page.run(f"document.getElementById({name!r}).value = {value!r}")
    page.run("document.getElementById('go').click()")
    page.wait("go.textContent === 'Ask'")


def column(page, number):
    """Title, text, tokens and their colours."""
    return page.run(
        f"""(() => {{ const s = document.querySelectorAll('section')[{number}];
        const tokens = [...s.querySelectorAll('.token')];
        return {{title: s.querySelector('h2').textContent, tokens: tokens.map(t => t.textContent),
          text: tokens.filter(t => !t.matches('.special')).map(t => t.textContent).join(''),
          forks: tokens.flatMap((t, n) => t.matches('.fork') ? [n] : []),
          shifts: tokens.map(t => t.dataset.shift), colours: tokens.map(t => getComputedStyle(t).backgroundColor)}} }})()"""
    )


def answer(client, **more):
    messages = [{"role": "user", "content": "23+48-17=?"}]
    body = {"messages": messages, "temperature": 1.3, "max_tokens": 40, "seed": 7, **more}
    told = client.post("/v1/chat/completions", json=body)
    assert told.status_code == 200, told.text
    return told.json()


@pytest.mark.slow
@in_browser
def test_with_a_key_it_shows_base_guided_and_best_of_k_side_by_side(http, server, opened):
    page = opened(server.url)
    page.wait("!unlock.hidden")
    [refused] = page.complaints  # the browser's own note of the 401 by which the page learns that there is a key
    assert "401" in refused
    page.complaints.clear()
    page.run(f"key.value = {KEY!r}; document.querySelector('#unlock button').click()")
    page.wait("!ask.hidden")
    page.run("scorer.selectedIndex = 1; guide.value = 'own'")
    ask(page, temperature=1.3, tokens=40, seed=7, beta=0.05, k=4)
    page.wait("document.querySelectorAll('section').length === 3")
    base, guided, best = (column(page, number) for number in range(3))
    assert [one["title"] for one in (base, guided, best)] == ["Base", "Guided", "Best of 4"]

    choice = answer(http)["choices"][0]
    assert base["text"] == choice["message"]["content"] and set(base["colours"]) == {"rgba(0, 0, 0, 0)"}

    choice = answer(http, guidance={"guide": "own", "beta": 0.05, "explain": True})["choices"][0]
    tokens = choice["guidance"]["tokens"]
    assert guided["text"] == choice["message"]["content"] != base["text"]
    fork = next(n for n, (one, other) in enumerate(zip(guided["tokens"], base["tokens"], strict=False)) if one != other)
    assert guided["forks"] == [fork] and base["forks"] == []
    shifts = [token["logprob"] - token["reference"] for token in tokens]
    assert [float(shift) for shift in guided["shifts"]] == pytest.approx(
        shifts, abs=1e-4
    )  # in another batch, other roundings
    for shift, colour in zip(shifts, guided["colours"], strict=True):
        if abs(shift) > 0.1:
            assert colour.startswith("rgba(47, 126, 216" if shift > 0 else "rgba(214, 120, 32"), (shift, colour)
    assert len(set(guided["colours"])) > 2

    told = answer(http, rerank={"k": 4, "probe": "late"})
    assert best["text"] == told["choices"][0]["message"]["content"]
    scores = page.run("[...document.querySelectorAll('.scores li')].map(l => [l.lastChild.textContent, l.className])")
    chosen = told["rerank"]["chosen"]
    assert scores == [
        [f"{score:.3f}", "chosen" if number == chosen else ""] for number, score in enumerate(told["rerank"]["scores"])
    ]

    number = next(number for number, token in enumerate(tokens) if len(token["candidates"]) > 2)
    page.run(f"document.querySelectorAll('section')[1].querySelectorAll('.token')[{number}].id = 'hovered'")
    page.move("#hovered")
    page.wait("!detail.hidden")
    rows = page.run("[...detail.querySelectorAll('tr')].slice(1).map(r => [...r.cells].map(c => c.textContent))")
    assert [row[3] for row in rows] == [f"{one['value']:.3f}" for one in tokens[number]["candidates"]]
    page.move("h1")
    page.wait("detail.hidden")

    page.open(server.url)  # the tab remembers the key
    page.wait("!ask.hidden")


@pytest.mark.slow
@in_browser
def test_a_lazily_guided_answer_is_shown_as_text_alone(lazy_catalogue, opened):
    with serving(lazy_catalogue, key=None) as running, httpx.Client(base_url=running.url, timeout=300) as client:
        page = opened(running.url)
        page.wait("!ask.hidden")
        ask(page, temperature=1.3, tokens=40, seed=7, beta=0.05)
        page.wait("document.querySelectorAll('section').length === 3")
        text, notes = page.run(
            "['.text', 'small'].map(name => document.querySelectorAll('section')[1].querySelector(name).textContent)"
        )
        assert text == answer(client, guidance={"beta": 0.05})["choices"][0]["message"]["content"]
        assert notes.endswith("KL not known") and page.run("[error.hidden, legend.hidden]") == [True, True]


@in_browser
def test_a_wrong_key_is_told(server, opened):
    page = opened(server.url)
    page.wait("!unlock.hidden")
    page.run("key.value = 'wrong'; document.querySelector('#unlock button').click()")
    page.wait("!error.hidden")
    assert page.run("error.textContent").startswith("api-key: missing or wrong") and page.run("ask.hidden")
    assert all("401" in complaint for complaint in page.complaints)
    page.complaints.clear()


@pytest.fixture(scope="module")
def plain(policy):
    with serving(Catalogue(policy, slots=2), key=None) as running:
        yield running


@in_browser
def test_only_what_the_server_offers_is_shown(plain, opened):
    page = opened(plain.url)
    page.wait("!ask.hidden")
    assert page.run("[guidance.hidden, rerank.hidden, unlock.hidden]") == [True, True, True]
    ask(page)
    assert page.run("document.querySelectorAll('section').length") == 1 and page.run("legend.hidden")
    assert column(page, 0)["text"] and page.run("error.hidden")


@in_browser
def test_what_the_server_refuses_is_told_and_markup_is_text(plain, opened):
    page = opened(plain.url)
    page.wait("!ask.hidden")
    ask(page, tokens=100_000)
    assert page.run("error.textContent").startswith("max_tokens: ")
    assert all("400" in complaint for complaint in page.complaints) and page.complaints
    page.complaints.clear()
    markup = "<img src=x onerror=alert(1)><script>alert(2)</script>"
    told = {
        "choices": [
            {
                "message": {"content": markup},
                "finish_reason": "stop",
                "logprobs": {
                    "content": [{"token": markup, "logprob": 0.0, "top_logprobs": [{"token": markup, "logprob": 0.0}]}]
                },
            }
        ],
        "usage": {"completion_tokens": 1},
    }
    page.run(f"window.fetch = async () => new Response({json.dumps(json.dumps(told))})")
    ask(page, tokens=10)
    assert (
        column(page, 0)["text"] == markup and page.run("document.querySelectorAll('main img, main script').length") == 0
    )
    page.move(".token")
    page.wait("!detail.hidden")
    assert page.run("detail.querySelectorAll('img, script').length") == 0


@in_browser
def test_stop_frees_the_server(plain, opened, slowly):
    page = opened(plain.url)
    page.wait("!ask.hidden")
    page.run(
        "temperature.value = 2; tokens.value = 400; seed.value = 1; go.click()"
    )  # at that temperature it ends late
    wait_until(lambda: plain.service.worker.running)
    assert page.run("go.textContent") == "Stop"
    page.run("go.click()")
    page.wait("go.textContent === 'Ask'")
    wait_until(lambda: not plain.service.worker.running)
    assert page.run("error.hidden && !document.querySelector('section')")


@in_browser
def test_it_reads_in_the_dark(plain, opened):
    page = opened(plain.url)
    paints = []
    for scheme in ("light", "dark"):
        page.colours(scheme)
        paints.append(
            page.run("[getComputedStyle(document.body).backgroundColor, getComputedStyle(document.body).color]")
        )
    page.colours("light")
    assert paints[0][0] == "rgb(255, 255, 255)" and paints[0] != paints[1]


@pytest.mark.parametrize("path", ["/", "/page.css", "/page.js"])
def test_it_needs_no_key_and_allows_nothing_from_elsewhere(server, path):
    told = httpx.get(server.url + path)
    assert told.status_code == 200 and len(told.text) > 500
    policy = told.headers["content-security-policy"]
    assert policy.startswith("default-src 'none'; script-src 'self';") and "unsafe" not in policy
    assert told.headers["x-content-type-options"] == "nosniff"
    assert "http" not in told.text.replace("http-equiv", "")


def test_without_a_key_it_is_this_machine_s_only(plain):
    assert httpx.get(plain.url, headers={"Host": "elsewhere.example"}).status_code == 403


@in_browser
@pytest.mark.skipif("POSTTRAIN_SCREENSHOT" not in os.environ, reason="makes the picture of the README")
def test_screenshot(policy, opened):
    shown = Path(os.environ["POSTTRAIN_SHOWN"])
    catalogue = Catalogue.load(policy, {"value": str(shown / "value")}, {"probe": str(shown / "probe")})
    with serving(catalogue, key=None) as running:
        page = opened(running.url)
        page.wait("!ask.hidden")
        page.resize(1100, 660)
        for seed in range(20):  # until guidance changes something
            ask(page, question="27+38+16=?", seed=seed)
            if page.run("Boolean(document.querySelector('.token.fork'))"):
                break
        page.run("document.querySelector('.token.fork').focus()")  # the mouse is away while a picture is taken
        page.wait("!detail.hidden")
        page.screenshot(Path(os.environ["POSTTRAIN_SCREENSHOT"]))
