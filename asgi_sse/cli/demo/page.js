"use strict";
const $ = (id) => document.getElementById(id);
const text = (id, value) => { $(id).textContent = value; };
const make = (name, className = "", content = "") => {
  const element = document.createElement(name);
  if (className) element.className = className;
  element.textContent = content;
  return element;
};
const say = (id, content, tone = "") => {
  if ($(id).textContent !== content) text(id, content);  // what is set again would be read out again
  $(id).className = `verdict ${tone}`;
};
const many = (count, one, more = `${one}s`) => `${count} ${count === 1 ? one : more}`;
const seconds = (ms) => `${(ms / 1000).toFixed(1)} s`;

async function ask(path, body) {
  const response = await fetch(path, { method: "POST", body: body && JSON.stringify(body) });
  if (!response.ok) throw new Error(await response.text());
  return response.text();
}

/* Streams. Over HTTP/1.1 a browser opens six connections to a server, for all of its tabs together: a seventh request
   would wait for ever, even a POST. So the tabs share four slots, by locks, and leave two connections for requests;
   and a tab that is hidden closes its streams, and gets what it has missed when it is looked at again. */

const SLOTS = ["asgi_sse 1", "asgi_sse 2", "asgi_sse 3", "asgi_sse 4"];
const HIDDEN_FOR = 5000;
const streams = [];
let away = document.hidden;

/* Resolves with a function that gives the slot back; rejects when `signal` is aborted. */
async function slot(signal, waits) {
  if (!navigator.locks) return () => {};  // not over plain HTTP from another machine
  const hold = (name, options) => new Promise((resolve, reject) => {
    const held = (lock) => lock ? new Promise((release) => resolve(release)) : resolve(null);
    navigator.locks.request(name, options, held).catch(reject);
  });
  for (const name of SLOTS) {
    const release = await hold(name, { ifAvailable: true });
    if (release) return release;
  }
  signal.throwIfAborted();  // while it was looked for, and nobody waits any more
  waits();
  const first = new AbortController();
  signal.addEventListener("abort", () => first.abort());
  let found = false;
  return Promise.any(SLOTS.map(async (name) => {
    const release = await hold(name, { signal: first.signal });
    if (found) { release(); throw new Error("another one was faster"); }
    found = true;
    first.abort();
    return release;
  }));
}

class Stream {
  /* `types`: what to do with the events of each type. `told`: is called with the state. */
  constructor(types, told) {
    Object.assign(this, { types, told, wanted: false, last: "", request: null, source: null, release: null });
    streams.push(this);
  }

  open(url, last = this.last) {
    Object.assign(this, { url, last, wanted: true });
    this.turn();
  }

  close(state = "closed") {
    this.wanted = false;
    this.turn(state);
  }

  turn(state = "paused") {
    const open = this.wanted && !away;
    if (open === Boolean(this.request)) return;
    if (open) this.begin(new AbortController());
    else this.end(state);
  }

  async begin(request) {
    this.request = request;
    this.told("connecting");
    let release = () => {};
    try {
      release = await slot(request.signal, () => this.told("waiting"));
    } catch {  // given up; or there are no locks here, as in a frame of another origin
    }
    if (request.signal.aborted) return release();
    this.release = release;
    const url = new URL(this.url, document.baseURI);
    // A new EventSource cannot send the header Last-Event-ID; from its second request on it does, and that counts.
    if (this.last) url.searchParams.set("last_event_id", this.last);
    const source = this.source = new EventSource(url);
    source.onopen = () => this.told("open");
    source.onerror = () => {
      if (source.readyState === EventSource.CLOSED) this.close("refused");
      else this.told("reconnecting");
    };
    for (const [type, hear] of Object.entries(this.types)) {
      source.addEventListener(type, (event) => {
        if (event.lastEventId) this.last = event.lastEventId;
        hear(JSON.parse(event.data), event);
      });
    }
  }

  end(state) {
    this.request.abort();
    this.source?.close();
    this.release?.();
    this.request = this.source = this.release = null;
    this.told(state);
  }
}

function look(hidden) {
  away = hidden;
  for (const stream of streams) stream.turn();
}

let hiding = 0;
document.addEventListener("visibilitychange", () => {
  clearTimeout(hiding);
  if (document.hidden) hiding = setTimeout(look, HIDDEN_FOR, true);
  else look(false);
});
addEventListener("pagehide", () => look(true));
addEventListener("pageshow", () => look(document.hidden));

/* The one stream of the page */

const STATES = {
  connecting: "Connecting", open: "Open", reconnecting: "Coming back", waiting: "Waiting for a connection",
  paused: "Paused", closed: "Closed", refused: "Refused",
};
const live = new Stream({
  state: (now, event) => {
    last(event);
    room(now.room);
    roll(now.streams);
    now.streams.ended.forEach(ended);
    progress(now.story);
    swarm(now.swarm);
  },
  figures: (now, event) => { last(event); figures(now); },
  streams: (now) => roll(now),
  ended: (stream) => ended(stream),
  here: ({ here }) => count(here),
  post: (post) => show(post),
  story: (now) => progress(now),
  drain: ({ at }) => drained(at),
  swarm: (client) => came(client),
}, (state) => {
  document.body.dataset.state = state;
  text("state", STATES[state]);
  text("toggle", live.wanted ? "Close stream" : "Open stream");
  $("notice").hidden = state !== "waiting";
  if (state === "waiting") {
    text("notice", "Other tabs of this browser have four streams open. Over HTTP/1.1 it opens six connections to one "
      + "server, so this tab waits until one of them is closed or hidden.");
  }
  own(state);
});

function last(event) {
  text("event", `id: ${event.lastEventId}\nevent: ${event.type}\ndata: ${event.data}`);
}

$("toggle").addEventListener("click", () => live.wanted ? live.close() : live.open("live"));

/* The story */

const LATE = 400;  // ms by which a token comes later than the fastest one did, if it was made while this page was away
const story = { run: "", of: 1, made: 0, got: 0, last: 0, lost: 0, doubled: 0, missed: 0, behind: 0, before: 0, skew: Infinity, cut: false };
const telling = new Stream({
  token: (token, event) => {
    const delay = Date.now() - token.at;
    story.skew = Math.min(story.skew, delay);
    // Where the other stream was cut as well, this page does not know how many were made before it was back.
    const late = token.n <= story.before || delay - story.skew > LATE;
    if (token.n <= story.last) story.doubled++;
    else story.lost += token.n - story.last - 1;
    story.last = Math.max(story.last, token.n);
    story.got++;
    if (late) {
      story.missed++;
      story.behind++;
    } else if (story.behind) {
      say("verdict", `Resumed: ${many(story.behind, "token")} at once that were made while away; ${check()}`, tone());
      story.behind = 0;
    }
    const word = make("span", late ? "late" : "", `${token.word} `);
    word.title = `id ${event.lastEventId}`;
    write(word);
    text("story-id", event.lastEventId);
    bars();
  },
  end: ({ reason }) => {
    telling.close("ended");
    write(make("span", "end", `(${reason})`));
    if (reason === "finished") say("verdict", `The end: ${story.got} of ${story.of} tokens in order; ${check()}`, tone());
    else say("verdict", `Ended by the server behind token ${story.last} of ${story.of} (${reason}); ${check()}`, "wait");
  },
  reset: () => say("verdict", "The server has not kept what came before: begin anew", "bad"),
}, (state) => {
  const going = telling.wanted || story.cut;
  $("begin").disabled = going;
  $("cut").disabled = !going;
  text("cut", story.cut ? "Resume" : "Cut the connection");
  if (state === "open") story.before = story.got ? story.made : 0;
  if (state === "open" && !story.got) say("verdict", "Receiving", "good");
  if (state === "waiting") say("verdict", "Waiting for a connection, of which other tabs have taken four", "wait");
  if (state === "refused") say("verdict", "The server does not know this text any more: begin anew", "bad");
  if (["reconnecting", "paused", "closed"].includes(state) && story.got && !$("words").lastChild.classList.contains("cut")) {
    write(make("span", "cut", "cut"));
    say("verdict", `Cut behind token ${story.last}. The server goes on`, "wait");
  }
});

const check = () => `${story.lost} lost, ${story.doubled} doubled`;
const tone = () => story.lost || story.doubled ? "bad" : "good";

function write(word) {
  const box = $("text");
  const follows = box.scrollHeight - box.scrollTop - box.clientHeight < 40;
  $("words").append(word);
  if (follows) box.scrollTop = box.scrollHeight;
}

function bars() {
  story.made = Math.max(story.made, story.last);
  text("made", story.made);
  text("received", story.got);
  const missed = story.missed + (story.cut ? story.made - story.last : 0);
  text("missed", missed);
  $("missed-by").className = missed ? "some" : "";
  $("made-bar").style.transform = `translateX(${100 * story.made / story.of - 100}%)`;
  $("received-bar").style.transform = `translateX(${100 * story.last / story.of - 100}%)`;
}

/* How far the server is with the story that is told now, whether or not this page listens. */
function progress(now) {
  text("begin", now.goes_on && now.run !== story.run ? "Watch" : "Begin");
  if (now.run !== story.run) return;
  story.made = now.made;
  story.of = now.of;
  bars();
}

$("begin").addEventListener("click", async () => {
  $("begin").disabled = true;
  try {
    const run = await ask("tell");
    Object.assign(story, { run, made: 0, got: 0, last: 0, lost: 0, doubled: 0, missed: 0, behind: 0, before: 0, cut: false });
    $("words").replaceChildren();
    text("story-id", "none");
    bars();
    telling.open(`story?channel=${encodeURIComponent(run)}`, "");
    $("cut").focus();
  } catch (error) {
    say("verdict", error.message, "bad");
    $("begin").disabled = false;
  }
});

$("cut").addEventListener("click", () => {
  story.cut = !story.cut;
  if (story.cut) telling.close();
  else telling.open(telling.url);
  bars();
});

/* The room */

const NAMES = ["Heron", "Otter", "Lynx", "Wren", "Badger", "Seal", "Ibex", "Finch", "Marten", "Swift", "Hare", "Newt",
  "Crane", "Vole", "Robin", "Beaver", "Falcon", "Dormouse", "Plover", "Stoat", "Kestrel", "Toad", "Linnet", "Moth"];
const KINDS = ["Quiet", "Brisk", "Gentle", "Merry", "Bold", "Lucky", "Clever", "Patient", "Sunny", "Nimble", "Early",
  "Amber", "Silver", "Scarlet", "Hazel", "Frosty", "Gallant", "Mellow", "Rustic", "Stormy", "Velvet", "Wistful", "Zesty"];
const pick = (list) => list[Math.floor(Math.random() * list.length)];
const me = `${pick(KINDS)} ${pick(NAMES)}`;
const colour = (name) => `c${[...name].reduce((sum, char) => sum + char.codePointAt(0), 0) % 6}`;

function room({ here, posts }) {
  count(here);
  $("posts").replaceChildren();
  if (!posts.length) $("posts").append(make("li", "none", "Nobody has said anything yet. What you say shows in every tab."));
  posts.forEach(show);
}

function count(here) {
  text("here", here);
  text("here-unit", here === 1 ? "tab is here" : "tabs are here");
}

function show({ name, text: said }) {
  $("posts").querySelector(".none")?.remove();
  const item = make("li");
  item.append(make("b", colour(name), name), said);
  add(item);
}

function add(item) {
  const posts = $("posts");
  posts.append(item);
  while (posts.children.length > 30) posts.firstChild.remove();
  posts.scrollTop = posts.scrollHeight;
}

async function post(said) {
  try {
    await ask("say", { name: me, text: said });
    return true;
  } catch (error) {
    add(make("li", "none", `Not sent: ${error.message}`));
    return false;
  }
}

text("me", me);
$("me").className = colour(me);
$("say").addEventListener("submit", async (event) => {
  event.preventDefault();
  const input = $("text-to-say");
  if (input.value.trim() && await post(input.value)) input.value = "";
});
for (const button of document.querySelectorAll(".quick button")) button.addEventListener("click", () => post(button.textContent));

/* The drain */

const SPAN = 6000;
const CLIENTS = 30;
const clients = new Map();
const mine = { state: "", lost: 0, back: 0, drained: false };  // this page
const STILL = matchMedia("(prefers-reduced-motion: reduce)");
let drainedAt = null;

for (let number = 0; number <= CLIENTS; number++) {
  const lane = make("div", number < CLIENTS ? "lane" : "lane own");
  lane.append(make("i"), make("b"));
  $("lanes").append(lane);
}

function swarm(now) {
  drainedAt = now.drained_at;
  clients.clear();
  for (const client of now.clients) clients.set(client.client, client);
  lanes();
}

function drained(at) {
  drainedAt = at;
  for (const client of clients.values()) Object.assign(client, { state: "away", told: 0 });
  // The page may learn of its own drain when it is back.
  if (Date.now() - mine.back > 2000) Object.assign(mine, { state: "open", back: 0, drained: true });
  lanes();
}

function came(client) {
  if (client.client === null) {
    clients.clear();  // their lanes stay, until others come
    $("drain").disabled = false;
    return;
  }
  if (!clients.size) drainedAt = null;
  const before = clients.get(client.client);
  clients.set(client.client, { ...client, told: client.retry ?? before?.told });
  lanes();
}

function own(state) {
  if (state === "reconnecting" && mine.state !== "away") Object.assign(mine, { state: "away", lost: Date.now() });
  if (state === "open") {
    if (mine.state === "away") Object.assign(mine, { state: "back", back: Date.now() });
    else mine.state = "open";
    mine.drained = false;
  }
  lanes();
}

function lanes() {
  const place = (lane, state, after, told) => {
    lane.classList.remove("open", "away", "back");
    lane.classList.add(state);
    lane.lastChild.style.left = `${Math.min(100, 100 * after / SPAN)}%`;
    lane.firstChild.style.width = `${Math.min(100, 100 * told / SPAN)}%`;
  };
  const after = [];
  for (const [number, client] of clients) {
    const back = drainedAt !== null && client.state === "open" && client.at > drainedAt;
    const time = back ? client.at - drainedAt : 0;
    if (back) after.push(time);
    const told = back ? time : client.state === "away" && client.told ? client.told : 0;
    place($("lanes").children[number], back ? "back" : client.state, time, told);
  }
  const ownTime = mine.state === "back" && drainedAt !== null ? mine.back - mine.lost : 0;
  place($("lanes").lastChild, drainedAt === null ? "open" : mine.state || "open", ownTime, ownTime);
  if (mine.state === "away") {
    const sofar = Math.min(SPAN, Date.now() - mine.lost);
    place($("lanes").lastChild, "away", 0, sofar);
    if (sofar < SPAN && !STILL.matches) requestAnimationFrame(lanes);
    if (mine.drained) say("drained", "Drained, and this page as well: when it is back, it learns when the others were", "wait");
    return;
  }
  if (!clients.size) return;
  const open = [...clients.values()].filter((client) => client.state === "open").length;
  if (drainedAt === null) {
    say("drained", `${open} of ${CLIENTS} clients are here`);
  } else if (after.length < CLIENTS) {
    say("drained", `Drained: ${after.length} of ${CLIENTS} are back`, "wait");
  } else {
    $("drain").disabled = false;
    const page = ownTime ? `; this page (below) after ${seconds(ownTime)}` : "";
    say("drained", `All ${CLIENTS} are back, from ${seconds(Math.min(...after))} to ${seconds(Math.max(...after))}${page}`, "good");
  }
  $("lanes").setAttribute("aria-label", `When each client came back: ${$("drained").textContent}`);
}

$("drain").addEventListener("click", async () => {
  $("drain").disabled = true;
  setTimeout(() => { $("drain").disabled = false; }, 8000);
  try {
    await ask("drain");
  } catch (error) {
    say("drained", error.message, "bad");
  }
});

/* The roll of streams */

const ROWS = 30;
const endings = [];  // the latest first; neighbours of one path and reason share a row

function line({ path, streams: number, age, events, bytes: sent }, state) {
  const row = make("tr");
  const first = make("td", "", path);
  if (number > 1) first.append(make("small", "", ` × ${number}`));
  const second = make("td");
  second.append(make("span", state, state.replace("_", " ")));
  row.append(first, second, make("td", "", age < 100 ? `${age.toFixed(1)} s` : `${Math.round(age)} s`), make("td", "", events), make("td", "", bytes(sent)));
  return row;
}

function roll({ lines, open, opened, ended: endedNow }) {
  if (endedNow) {
    endings.length = 0;
    $("ended").replaceChildren();
  }
  text("open", open);
  text("opened", opened);
  $("running").replaceChildren(...lines.map((stream) => line(stream, stream.state)));
}

function ended(stream) {
  const rows = $("ended");
  const before = endings[0];
  if (before && before.path === stream.path && before.reason === stream.reason) {
    before.streams += stream.streams;
    before.age = Math.max(before.age, stream.age);
    before.events += stream.events;
    before.bytes += stream.bytes;
    rows.firstChild.replaceWith(line(before, before.reason));
    return;
  }
  endings.unshift({ ...stream });
  rows.prepend(line(stream, stream.reason));
  if (endings.length > ROWS) {
    endings.pop();
    rows.lastChild.remove();
  }
}

/* This machine */

const WINDOW = 60000;
const bar = (element, value) => { element.style.transform = `translateX(${value - 100}%)`; };
const percent = (value) => `${Math.round(value)} %`;
let samples = [];

function bytes(value) {
  let unit = 0;
  for (; value >= 1000 && unit < 5; unit++) value /= 1024;
  return `${value.toFixed(unit && value < 100 ? 1 : 0)} ${["B", "KiB", "MiB", "GiB", "TiB", "PiB"][unit]}`;
}

function figures({ at, cpu, memory, network, load, rss }) {
  const mean = cpu.reduce((sum, value) => sum + value, 0) / (cpu.length || 1);
  // By the server's clock: what was missed comes all at once, and has its place.
  samples = samples.filter((sample) => Math.abs(at - sample.at) <= WINDOW);  // a clock can be put back
  samples.push({ at, cpu: mean, in: network?.in ?? 0, out: network?.out ?? 0 });
  text("cpu", percent(mean));
  cores(cpu);
  plot("cpu", at, 100);
  text("memory", `${bytes(memory.used)} of ${bytes(memory.total)}`);
  bar($("memory-bar"), memory.percent);
  for (const name of ["in", "out", "loopback"]) text(name, network ? `${bytes(network[name])}/s` : "unknown");
  const peak = Math.max(1024, ...samples.map((sample) => Math.max(sample.in, sample.out)));
  plot("in", at, peak);
  plot("out", at, peak);
  text("load", load ? load.map((value) => value.toFixed(2)).join(" · ") : "unknown");
  text("rss", bytes(rss));
}

function cores(values) {
  const list = $("cores");
  while (list.children.length > values.length) list.lastChild.remove();
  while (list.children.length < values.length) {
    const core = make("li");
    core.append(make("i"));
    list.append(core);
  }
  values.forEach((value, index) => {
    list.children[index].title = `Core ${index}: ${percent(value)}`;
    bar(list.children[index].firstChild, value);
  });
}

function plot(name, now, top) {
  let outline = "", fill = "", run = [];
  samples.forEach((sample, index) => {
    run.push(`${(60 - (now - sample.at) / 1000).toFixed(2)} ${(100 - 100 * sample[name] / top).toFixed(2)}`);
    const next = samples[index + 1];
    if (next && next.at - sample.at < 3000) return;
    outline += `M${run.join("L")}`;  // a gap, where nothing was measured, stays a gap
    fill += `M${run[0].split(" ")[0]} 100L${run.join("L")}V100Z`;
    run = [];
  });
  $(`${name}-line`).setAttribute("d", outline);
  $(`${name}-fill`)?.setAttribute("d", fill);
}

live.open("live");
