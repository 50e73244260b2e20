"""The demo page as a visit: two people, the note, the voice, tokens, and what is told of what happens underneath."""

import base64
import re
from collections.abc import AsyncIterator, Iterator
from unittest import mock

import pytest
from playwright.async_api import Browser, BrowserContext, Page, Route, expect

from realtime.responders import demo
from realtime.responders.base import Request
from realtime.responders.demo import ANSWER
from tests.end_to_end import echo
from tests.end_to_end.page import WORDS, Paced, answered, ask, events_of, logged_answers, session_of, visit
from tests.support.browser import OpenContext, allowed_errors, browser, chromium, context, needs_chromium, open_context
from tests.support.event_sources import NODE_FOLDER, node_with_packages
from tests.support.server import running_server
from tests.support.tokens import SECRET, token

__all__ = ["allowed_errors", "browser", "chromium", "context", "open_context"]
pytestmark = needs_chromium

QUICK_WORDS_PER_S = 150.0
NOTED_MS = 30_000
VOICE = """
globalThis.spoken = [];
Object.defineProperty(globalThis, "speechSynthesis", { value: { speak: (one) => spoken.push(one), cancel() {} } });
globalThis.SpeechSynthesisUtterance = class { constructor(text) { this.text = text; } };
globalThis.SpeechRecognition = class {
  start() { globalThis.ear = this; }
  stop() { this.onend(); }
  hear(transcript, isFinal) { this.hearAll([transcript, isFinal]); }
  hearAll(...heard) {
    const results = heard.map(([transcript, isFinal]) => Object.assign([{ transcript }], { isFinal }));
    this.onresult({ results: [null, ...results], resultIndex: 1 });
  }
};
"""
"""A voice and an ear that do what a test says: a headless browser has none."""
READ_CODE = """async (encoded) => {
  const picture = await createImageBitmap(await (await fetch("data:image/png;base64," + encoded)).blob());
  const canvas = new OffscreenCanvas(picture.width, picture.height).getContext("2d");
  canvas.drawImage(picture, 0, 0);
  return jsQR(canvas.getImageData(0, 0, picture.width, picture.height).data, picture.width, picture.height)?.data;
}"""


@pytest.fixture
def quick_demo() -> Iterator[None]:
    """Have the demo responder speak faster than a person listens."""
    with mock.patch.object(demo, "WORDS_PER_S", QUICK_WORDS_PER_S):
        yield


async def words_of(page: Page) -> list[str]:
    """Everything that was said, as the page shows it."""
    return await page.locator("#log .text").all_text_contents()


async def test_the_whole_story(open_context: OpenContext, quick_demo: None) -> None:
    """Out of the box, without a key: a visit of two, an answer that is cut off and whole, and a note that both see."""
    async with running_server() as server, await open_context() as first, await open_context() as second:
        clinician = await visit(first, server.url)
        await clinician.get_by_role("button", name="Fill in a sample visit").click()
        await expect(clinician.locator(".user")).to_have_count(6)
        await clinician.get_by_role("button", name="Invite").click()
        link = await clinician.locator("#invite-link").get_attribute("href")
        await clinician.keyboard.press("Escape")
        assert link is not None
        patient = await visit(second, link)
        await ask(patient, "What now?")
        await expect(clinician.locator(".answer .text")).to_contain_text("demo responder")
        await clinician.get_by_role("button", name="Drop connection").click()
        await answered(patient)
        await expect(clinician.locator("body")).to_have_attribute("data-state", "open")
        await answered(clinician)
        await patient.get_by_role("button", name="Draft the note").click()
        for page in (clinician, patient):
            await expect(page.locator("#note")).to_have_attribute("data-status", "complete", timeout=NOTED_MS)
            headings = page.locator("#note-text h3")
            await expect(headings).to_have_text(["Subjective", "Objective", "Assessment", "Plan"])
            await expect(page.locator("#note-text section").first).to_contain_text("Light makes it worse")
            await expect(page.locator("#note-text section").last).to_contain_text("keep a headache diary")
            await expect(page.locator("#note-text .label")).to_contain_text("Draft, written by a machine")
            await expect(page.get_by_text("Demo: no model wrote this")).to_have_count(1)
        assert await words_of(clinician) == await words_of(patient)
        assert await logged_answers(server, clinician) == [ANSWER.format(said="What now?")]


async def test_two_tabs_are_one_visit(context: BrowserContext) -> None:
    """Who is present is shown, who speaks is named, and both read the same, live."""
    paced = Paced()
    async with running_server(responder=paced) as server, context:
        first = await visit(context, server.url)
        second = await visit(context, f"{first.url}&seat=patient")
        for page in (first, second):
            await expect(page.locator("#presence li")).to_have_count(2)
        await expect(first.locator("#presence .own")).to_have_text("YYou, clinician")
        await expect(second.locator("#presence .own")).to_have_text("YYou, patient")
        await expect(second.locator("#presence .name").last).to_have_text("Someone")
        await ask(second, "From the second")
        await expect(first.locator(".user .text")).to_have_text("From the second")
        await expect(first.locator(".user .who")).to_have_text("Patient")
        await expect(first.locator(".user.own")).to_have_count(0)
        await expect(second.locator(".user.own")).to_have_count(1)
        await paced.let(5)
        for page in (first, second):
            await expect(page.locator(".answer .text")).to_have_text("".join(WORDS[:5]).strip())
        await paced.let()
        await answered(first)
        await second.close()
        await expect(first.locator("#presence li")).to_have_count(1)


async def test_people_can_talk_without_the_assistant(context: BrowserContext) -> None:
    """What is said with the assistant out of it is there for everybody, and asks no model."""
    paced = Paced()
    async with running_server(responder=paced) as server, context:
        first = await visit(context, server.url)
        second = await visit(context, f"{first.url}&seat=patient")
        await first.get_by_label("Assistant answers").uncheck()
        await ask(first, "Between us")
        await expect(second.locator(".user .text")).to_have_text("Between us")
        await expect(first.locator(".unsent")).to_have_count(0)
        await expect(second.locator(".answer")).to_have_count(0)
        assert paced.asked == []


async def test_the_code_is_the_link(context: BrowserContext, browser: Browser) -> None:
    """A camera reads from the QR code what the link says: the session, the other seat, and no more."""
    await node_with_packages()
    async with running_server() as server, context:
        page = await visit(context, server.url)
        await page.get_by_role("button", name="Invite").click()
        picture = await page.locator("#invite-code svg").screenshot()
        link = f"{server.url}/#{session_of(page)}&seat=patient"
        await expect(page.locator("#invite-link")).to_have_attribute("href", link)
        reader = await (await browser.new_context()).new_page()
        await reader.evaluate((NODE_FOLDER / "node_modules/jsqr/dist/jsQR.js").read_text())
        assert await reader.evaluate(READ_CODE, base64.b64encode(picture).decode()) == link


async def test_an_invitation_has_nobodys_token_in_it(context: BrowserContext) -> None:
    """Where the server asks who one is there is no link, but the way to a guest's token, with which one is let in."""
    async with running_server(echo, auth_secret=SECRET) as server, context:
        given = token("ann")
        page = await visit(context, f"{server.url}/#token={given}")
        await expect(page.locator("#presence .own")).to_contain_text("ann (you)")
        await page.get_by_role("button", name="Invite").click()
        await expect(page.locator("#invite-link")).to_be_hidden()
        await expect(page.locator("#invite-command")).to_have_text(
            f"realtime token --user ben --session {session_of(page)}"
        )
        assert given not in await page.content()
        guest = await visit(context, f"{server.url}/#token={token('ben', session_id=session_of(page))}&seat=patient")
        assert session_of(guest) == session_of(page)
        await page.keyboard.press("Escape")
        await ask(guest, "Let in")
        await expect(page.locator(".user .who")).to_have_text("Patient · ben")
        await answered(page)


async def test_a_token_in_the_address_is_used_and_not_left_there(context: BrowserContext) -> None:
    """It is offered to the server, given to it for a cookie, and stands in no address that a person could copy."""
    kept: list[str | None] = []

    async def keep(route: Route) -> None:
        kept.append(route.request.headers.get("authorization"))
        await route.fulfill(status=204)

    await context.route("**/v1/auth/cookie", keep)
    await context.add_init_script(
        "WebSocket = class extends WebSocket {"
        "  constructor(url, protocols) { super(url, ['realtime.v1']); (globalThis.offered ??= []).push(...protocols); }"
        "};"
    )
    async with running_server(echo) as server:
        page = await visit(context, f"{server.url}/#token=a.b-c.d_e")
        assert re.fullmatch(r"sess_\w+", session_of(page))
        offered = await page.evaluate("offered")
        assert await page.evaluate("history.length") == 2  # the empty tab, and this
    assert offered == ["realtime.v1", "bearer.a.b-c.d_e"]
    assert kept == ["Bearer a.b-c.d_e"]


async def test_a_pasted_token_opens_the_page(context: BrowserContext, allowed_errors: list[str]) -> None:
    """Who comes without one is asked for it, and is let in without a reload; a wrong one is told."""
    allowed_errors.append("status of 401")
    async with running_server(echo, auth_secret=SECRET) as server, context:
        page = await context.new_page()
        await page.goto(server.url)
        field = page.get_by_label("This server asks who you are")
        await expect(field).to_be_focused()
        await expect(page.locator("#state")).to_have_text("Waits for a token")
        await expect(page.locator("#suggestions")).to_be_hidden()
        await field.fill("wrong")
        await field.press("Enter")
        await expect(page.locator("#notice")).to_have_text("The server does not accept this token.")
        await field.fill(token("ann"))
        await field.press("Enter")
        await expect(page.locator("body")).to_have_attribute("data-state", "open")
        await expect(field).to_be_hidden()
        await expect(page.get_by_label("Message")).to_be_focused()


async def test_a_note_streams_in_and_can_be_stopped(context: BrowserContext) -> None:
    """Sections appear while they are written, with how far it is; Stop ends the task, and what is there stays."""
    notes = Paced()

    async def responder(request: Request) -> AsyncIterator[str]:
        if not request.messages[-1].content.startswith("<conversation"):
            yield "Yes?"
        elif "section Subjective" in request.messages[-1].content:
            yield "- Chief complaint: <b>headache</b>\n"
            yield "not asked"
        else:
            async for word in notes(request):
                yield word

    async with running_server(responder=responder) as server, context:
        page = await visit(context, server.url)
        await expect(page.locator("#draft")).to_have_attribute("aria-disabled", "true")
        await ask(page, "I have a headache.")
        await answered(page)
        await page.get_by_role("button", name="Draft the note").click()
        await notes.let(2)
        await expect(page.locator("#note-text h3")).to_have_text(["Subjective", "Objective"])
        await expect(page.locator("#note-text li b")).to_have_text("Chief complaint:")
        await expect(page.locator("#note-text li")).to_contain_text("<b>headache</b>")
        await expect(page.locator("#note-text section").last).to_contain_text("word0 word1")
        await expect(page.locator("#note-words")).to_have_text("Being written, Subjective is done")
        await expect(page.locator("#note-progress")).to_have_js_property("value", 1)
        await page.get_by_role("button", name="Stop writing").click()
        await notes.closed.wait()
        await expect(page.locator("#note-words")).to_contain_text("Stopped")
        await expect(page.locator("#note-text h3")).to_have_count(2)


async def test_a_bullet_is_one_from_its_first_word(context: BrowserContext) -> None:
    """Its dash alone is nothing, neither a paragraph nor an empty bullet."""
    notes = Paced()

    async def responder(request: Request) -> AsyncIterator[str]:
        if not request.messages[-1].content.startswith("<conversation"):
            yield "Yes?"
            return
        yield "- One\n-"
        async for word in notes(request):
            yield f" {word}"

    async with running_server(responder=responder) as server, context:
        page = await visit(context, server.url)
        await ask(page, "I have a headache.")
        await answered(page)
        await page.get_by_role("button", name="Draft the note").click()
        section = page.locator("#note-text section").first
        await expect(section.locator("li")).to_have_text(["One"])
        await expect(section.locator("p")).to_have_count(0)
        await expect(page.locator("#note-text section > *")).to_have_count(2)
        await notes.let(1)
        await expect(section.locator("li")).to_have_text(["One", "word0"])
        await page.get_by_role("button", name="Stop writing").click()
        await notes.closed.wait()


async def test_what_is_asked_for_while_cut_off_is_asked_for_once(context: BrowserContext) -> None:
    """One note, however often the button is pressed, and one sample visit; the page says what they wait for."""
    async with running_server(echo) as server, context:
        page = await visit(context, server.url)
        await page.get_by_role("button", name="Drop connection").click()
        await page.evaluate("document.getElementById('sample').click(); document.getElementById('sample').click()")
        await expect(page.locator(".user.unsent")).to_have_count(6)
        await page.evaluate("for (let press = 0; press < 3; press += 1) document.getElementById('draft').click()")
        await expect(page.locator("#note-words")).to_have_text("Waits for the connection")
        await expect(page.locator("#draft")).to_have_attribute("aria-disabled", "true")
        await expect(page.locator("#note")).to_have_attribute("data-status", "complete")
        await expect(page.locator(".user:not(.unsent)")).to_have_count(6)
        await expect(page.locator("#draft")).to_have_attribute("aria-disabled", "false")
        assert len(await events_of(server, page, "task.created")) == 1
        assert len(await events_of(server, page, "conversation.item.created")) == 6


async def test_a_note_that_is_refused_can_be_asked_for_again(context: BrowserContext) -> None:
    """The reason is told, and nothing waits any more."""
    async with running_server(echo, rate_tasks="1/minute") as server, context:
        page = await visit(context, server.url)
        await ask(page, "I have a headache.")
        await answered(page)
        await page.get_by_role("button", name="Draft the note").click()
        await expect(page.locator("#note")).to_have_attribute("data-status", "complete")
        await page.get_by_role("button", name="Draft again").click()
        await expect(page.locator("#notice")).to_be_visible()
        await expect(page.locator("#draft")).to_have_attribute("aria-disabled", "false")
        await expect(page.locator("#note-words")).to_have_text("Draft, to be checked")


async def test_what_stopping_has_saved_is_never_told_as_nothing(context: BrowserContext) -> None:
    """An answer that is stopped past the mean of the finished ones may have saved something: at most so much."""
    paced = Paced()

    async def responder(request: Request) -> AsyncIterator[str]:
        if request.messages[-1].content == "Be brief":
            yield "Yes."
            return
        async for word in paced(request):
            yield word

    async with running_server(responder=responder, max_output_tokens=1000) as server, context:
        page = await visit(context, server.url)
        await ask(page, "Go on")
        await paced.let(60)
        await expect(page.locator(".answer .text")).to_contain_text("word59")
        await ask(page, "Be brief")
        await answered(page)
        await expect(page.locator("#fact-saved-more")).to_have_text("past the usual length")
        await expect(page.locator("#fact-saved")).to_have_text(re.compile(r"^at most \d{3} tokens$"))


async def test_typing_into_a_voice_keeps_what_was_heard(context: BrowserContext) -> None:
    """An answer that is read aloud is cut where the listener was; the conversation keeps that much of it."""
    paced = Paced()
    await context.add_init_script(VOICE)

    async def responder(request: Request) -> AsyncIterator[str]:
        yield "One two three. Four five six. "
        async for word in paced(request):
            yield word

    async with running_server(responder=responder) as server, context:
        page = await visit(context, server.url)
        await page.get_by_role("button", name="Read answers aloud").click()
        await ask(page, "Read to me")
        await page.wait_for_function("spoken.length === 1")
        assert await page.evaluate("spoken[0].text") == "One two three. Four five six. "
        await page.evaluate("spoken[0].onboundary({ charIndex: 8 })")
        await paced.let(1)
        await ask(page, "Never mind")
        await expect(page.locator(".answer .mark").first).to_contain_text("Interrupted: 8 of ")
        await expect(page.locator(".answer .unheard").first).to_contain_text("three. Four five six.")
        [truncated] = await events_of(server, page, "conversation.item.truncated")
        assert truncated["item"]["heard_chars"] == 8
        await paced.let()


async def test_without_the_voice_all_of_it_counts_as_read(context: BrowserContext) -> None:
    """A voice that is turned off, or that the browser lacks after all, cuts nothing off an answer that is stopped."""
    paced = Paced()
    await context.add_init_script(VOICE)
    async with running_server(responder=paced) as server, context:
        page = await visit(context, server.url)
        await page.get_by_role("button", name="Read answers aloud").click()
        await ask(page, "Read to me")
        await page.wait_for_function("document.querySelector('.answer')")
        await paced.let(3)
        await page.get_by_role("button", name="Read answers aloud").click()
        await expect(page.locator(".answer .text")).to_contain_text("word2")
        await page.get_by_role("button", name="Stop", exact=True).click()
        await expect(page.locator(".answer .mark")).to_have_text("Stopped")
        assert await events_of(server, page, "conversation.item.truncated") == []


async def test_talking_interrupts_and_is_answered(context: BrowserContext) -> None:
    """At the first word that is heard the answer stops; the sentence, once it is whole, is said."""
    paced = Paced()
    await context.add_init_script(VOICE)
    async with running_server(responder=paced) as server, context:
        page = await visit(context, server.url)
        await ask(page, "Go on")
        await paced.let(3)
        await expect(page.locator(".answer .text")).to_contain_text("word2")
        await page.get_by_role("button", name="Talk").click()
        await page.evaluate("ear.hear('wait a', false)")
        await expect(page.locator(".answer .mark")).to_have_text("Stopped")
        await expect(page.get_by_label("Message")).to_have_value("wait a")
        await page.evaluate("ear.hear('wait a moment', true)")
        await expect(page.locator(".user .text").last).to_have_text("wait a moment")
        await paced.let()
        await answered(page)
        assert paced.asked == ["Go on", "wait a moment"]


async def test_what_is_heard_at_once_is_all_said(context: BrowserContext) -> None:
    """Two sentences that end together are one message; what follows them stands in the field until it is whole."""
    await context.add_init_script(VOICE)
    async with running_server(echo) as server, context:
        page = await visit(context, server.url)
        await page.get_by_role("button", name="Talk").click()
        await page.evaluate(
            "ear.hearAll(['It hurts.', true], [' Since Monday.', true], [' And', false], [' now', false])"
        )
        await expect(page.locator(".user .text")).to_have_text("It hurts. Since Monday.")
        await expect(page.get_by_label("Message")).to_have_value("And now")


async def test_a_microphone_that_may_not_listen_is_told(context: BrowserContext) -> None:
    """The page says so, and goes on without."""
    await context.add_init_script(VOICE)
    async with running_server() as server, context:
        page = await visit(context, server.url)
        await page.get_by_role("button", name="Talk").click()
        await expect(page.get_by_role("button", name="Talk")).to_have_attribute("aria-pressed", "true")
        await page.evaluate("ear.onerror({ error: 'not-allowed' })")
        await expect(page.locator("#notice")).to_contain_text("can't listen (not-allowed)")
        await expect(page.get_by_role("button", name="Talk")).to_have_attribute("aria-pressed", "false")


async def test_what_happens_underneath_is_told(context: BrowserContext) -> None:
    """Each event with its channel, number and merge count; how long tokens take; what stopping has saved, at most."""
    paced = Paced()
    async with running_server(responder=paced, max_output_tokens=1000, prices=("*=1/5",)) as server, context:
        page = await visit(context, server.url)
        await ask(page, "Go on")
        await paced.let(10)
        await expect(page.locator("#fact-positions")).to_have_text(re.compile(r"session \d+\s· resp_\S+ 11"))
        newest = page.locator("#events li").first
        await expect(newest).to_have_text(re.compile(r"response\.output_text\.deltaresp_\S+#11"))
        await expect(page.locator("#fact-transport")).to_have_text("WebSocket")
        await expect(page.locator("#fact-first-token")).to_contain_text(" ms")
        await expect(page.locator("#fact-median")).to_contain_text(" ms")
        await page.get_by_role("button", name="Drop connection").click()
        await paced.let(60)
        await expect(page.locator(".answer .text")).to_contain_text("word59")
        await expect(page.locator("#events")).to_contain_text("×50")
        await expect(page.locator("#fact-reconnects")).to_have_text(
            re.compile(r"1, away [\d.]+ s, 50 tokens caught up")
        )
        await page.get_by_role("button", name="Stop", exact=True).click()
        await expect(page.locator("#fact-saved")).to_have_text(re.compile(r"^at most \d{3} tokens$"))
        await paced.let()
        await ask(page, "And to the end")
        await answered(page)
        await expect(page.locator("#fact-saved")).to_have_text(re.compile(r"^about [\d,]+ tokens$"))
        await expect(page.locator("#fact-saved-more")).to_have_text(re.compile(r"^\$[\d.]+, at most \d{3}$"))
        await expect(page.locator("#fact-cost")).to_contain_text("$0.00")
