"use strict";
const $ = (id) => document.getElementById(id);
const setText = (id, value) => { $(id).textContent = value; };
const make = (name, className = "", content = "") => {
  const element = document.createElement(name);
  if (className) element.className = className;
  element.textContent = content;
  return element;
};
const setVerdict = (id, content, tone = "") => {
  if ($(id).textContent !== content) setText(id, content);  // a screen reader reads text again when it is set again
  $(id).className = `verdict ${tone}`;
};
const plural = (count, one, more = `${one}s`) => `${count} ${count === 1 ? one : more}`;
const formatSeconds = (ms) => `${(ms / 1000).toFixed(1)} s`;

async function sendPost(path, body) {
  const response = await fetch(path, { method: "POST", body: body && JSON.stringify(body) });
  if (!response.ok) throw new Error(await response.text());
  return response.text();
}

/* The page's own stream, which carries everything except the text */

const STATES = {
  connecting: "Connecting", open: "Connected", reconnecting: "Reconnecting", waiting: "Waiting for a connection",
  paused: "Paused", closed: "Disconnected", refused: "Refused",
};
const live = new Stream({
  state: (state, event) => {
    showEvent(event);
    showRoom(state.room);
    showStreams(state.streams);
    state.streams.ended.forEach(addEnded);
    showProgress(state.story);
    setClients(state.swarm);
  },
  figures: (figures, event) => { showEvent(event); showFigures(figures); },
  streams: (now) => showStreams(now),
  ended: (stream) => addEnded(stream),
  here: ({ here }) => showTabs(here),
  post: (post) => addPost(post),
  story: (now) => showProgress(now),
  drain: ({ at }) => startDrain(at),
  swarm: (client) => updateClient(client),
}, (state) => {
  document.body.dataset.state = state;
  setText("state", STATES[state]);
  setText("toggle", live.wanted ? "Disconnect page" : "Connect page");
  $("notice").hidden = state !== "waiting";
  if (state === "waiting") {
    setText("notice", "This tab waits, because four streams are open in other tabs. Over HTTP/1.1, a browser opens at "
      + "most six connections to a server. Close or hide another tab.");
  }
  updatePage(state);
});

function showEvent(event) {
  setText("event", `id: ${event.lastEventId}\nevent: ${event.type}\ndata: ${event.data}`);
}

$("toggle").addEventListener("click", () => live.wanted ? live.close() : live.open("live"));

/* The text. Each word is an event of type `token`. */

const LATE_MS = 400;  // a word that takes so much longer than the fastest one was written while this tab was disconnected
const NEW_STORY = { written: 0, got: 0, last: 0, lost: 0, repeated: 0, missed: 0, caughtUp: 0, before: 0, cut: false };
const story = { run: "", of: 1, fastest: Infinity, ...NEW_STORY };
const telling = new Stream({
  token: (token, event) => {
    const delay = Date.now() - token.at;  // includes the difference of the clocks, so only comparisons count
    story.fastest = Math.min(story.fastest, delay);
    // If the page's stream was cut too, the page does not know how many words were written before it was back.
    const late = token.n <= story.before || delay - story.fastest > LATE_MS;
    if (token.n <= story.last) story.repeated++;
    else story.lost += token.n - story.last - 1;
    story.last = Math.max(story.last, token.n);
    story.got++;
    if (late) {
      story.missed++;
      story.caughtUp++;
    } else if (story.caughtUp) {
      setVerdict("verdict", `Resumed: ${plural(story.caughtUp, "missed word")} arrived at once; ${countErrors()}`, tone());
      story.caughtUp = 0;
    }
    const word = make("span", late ? "late" : "", `${token.word} `);
    word.title = `id ${event.lastEventId}`;
    appendWord(word);
    setText("story-id", event.lastEventId);
    showCounts();
  },
  end: ({ reason }) => {
    telling.close("ended");
    appendWord(make("span", "end", `(${reason})`));
    if (reason === "finished") setVerdict("verdict", `Finished: ${story.got} of ${story.of} words; ${countErrors()}`, tone());
    else setVerdict("verdict", `The server ended the text after word ${story.last} of ${story.of} (${reason}); ${countErrors()}`, "wait");
  },
  reset: () => setVerdict("verdict", "The server no longer has the words you missed. Start a new text.", "bad"),
}, (state) => {
  const active = telling.wanted || story.cut;
  $("begin").disabled = active;
  $("cut").disabled = !active;
  setText("cut", story.cut ? "Resume" : "Disconnect");
  if (state === "open") story.before = story.got ? story.written : 0;
  if (state === "open" && !story.got) setVerdict("verdict", "Receiving", "good");
  if (state === "waiting") setVerdict("verdict", "Waiting, because four streams are open in this browser", "wait");
  if (state === "refused") setVerdict("verdict", "The server no longer has this text. Start a new one.", "bad");
  if (["reconnecting", "paused", "closed"].includes(state) && story.got && !$("words").lastChild.classList.contains("cut")) {
    appendWord(make("span", "cut", "disconnected"));
    setVerdict("verdict", `Disconnected after word ${story.last}. The server keeps writing.`, "wait");
  }
});

const countErrors = () => `${story.lost} lost, ${story.repeated} repeated`;
const tone = () => story.lost || story.repeated ? "bad" : "good";

function appendWord(word) {
  const box = $("text");
  const atEnd = box.scrollHeight - box.scrollTop - box.clientHeight < 40;
  $("words").append(word);
  if (atEnd) box.scrollTop = box.scrollHeight;
}

function showCounts() {
  story.written = Math.max(story.written, story.last);
  setText("written", story.written);
  setText("received", story.got);
  const missed = story.missed + (story.cut ? story.written - story.last : 0);
  setText("missed", missed);
  $("missed-box").className = missed ? "some" : "";
  $("written-bar").style.transform = `translateX(${100 * story.written / story.of - 100}%)`;
  $("received-bar").style.transform = `translateX(${100 * story.last / story.of - 100}%)`;
}

/* Shows how far the server is, whether or not this tab reads the text. */
function showProgress(now) {
  setText("begin", now.running && now.run !== story.run ? "Watch" : "Start");
  if (now.run !== story.run) return;
  story.written = now.written;
  story.of = now.of;
  showCounts();
}

$("begin").addEventListener("click", async () => {
  $("begin").disabled = true;
  try {
    const run = await sendPost("tell");
    Object.assign(story, NEW_STORY, { run });
    $("words").replaceChildren();
    setText("story-id", "none");
    showCounts();
    telling.open(`story?channel=${encodeURIComponent(run)}`, "");
    $("cut").focus();
  } catch (error) {
    setVerdict("verdict", error.message, "bad");
    $("begin").disabled = false;
  }
});

$("cut").addEventListener("click", () => {
  story.cut = !story.cut;
  if (story.cut) telling.close();
  else telling.open(telling.url);
  showCounts();
});

/* The chat */

const ANIMALS = ["Heron", "Otter", "Lynx", "Wren", "Badger", "Seal", "Ibex", "Finch", "Marten", "Swift", "Hare", "Newt",
  "Crane", "Vole", "Robin", "Beaver", "Falcon", "Dormouse", "Plover", "Stoat", "Kestrel", "Toad", "Linnet", "Moth"];
const TRAITS = ["Quiet", "Brisk", "Gentle", "Merry", "Bold", "Lucky", "Clever", "Patient", "Sunny", "Nimble", "Early",
  "Amber", "Silver", "Scarlet", "Hazel", "Frosty", "Gallant", "Mellow", "Rustic", "Stormy", "Velvet", "Wistful", "Zesty"];
const MAX_POSTS = 30;
const pick = (list) => list[Math.floor(Math.random() * list.length)];
const me = `${pick(TRAITS)} ${pick(ANIMALS)}`;
const colour = (name) => `c${[...name].reduce((sum, char) => sum + char.codePointAt(0), 0) % 6}`;

function showRoom({ here, posts }) {
  showTabs(here);
  $("posts").replaceChildren();
  if (!posts.length) $("posts").append(make("li", "none", "No messages yet. A message appears in every open tab."));
  posts.forEach(addPost);
}

function showTabs(here) {
  setText("here", here);
  setText("here-unit", here === 1 ? "open tab" : "open tabs");
}

function addPost({ name, text }) {
  $("posts").querySelector(".none")?.remove();
  const item = make("li");
  item.append(make("b", colour(name), name), text);
  appendPost(item);
}

function appendPost(item) {
  const posts = $("posts");
  posts.append(item);
  while (posts.children.length > MAX_POSTS) posts.firstChild.remove();
  posts.scrollTop = posts.scrollHeight;
}

async function sendMessage(text) {
  try {
    await sendPost("say", { name: me, text });
    return true;
  } catch (error) {
    appendPost(make("li", "none", `Not sent: ${error.message}`));
    return false;
  }
}

setText("me", me);
$("me").className = colour(me);
$("say").addEventListener("submit", async (event) => {
  event.preventDefault();
  const input = $("text-to-say");
  if (input.value.trim() && await sendMessage(input.value)) input.value = "";
});
for (const button of document.querySelectorAll(".quick button")) {
  button.addEventListener("click", () => sendMessage(button.textContent));
}

/* The restart: a lane for each test client, and one for this page */

const SPAN_MS = 6000;  // the length of the axis
const CLIENTS = 30;
const ENABLE_AFTER_MS = 8000;  // the button is usable again even if a client does not come back
const clients = new Map();
const page = { state: "", lostAt: 0, backAt: 0, announced: false };
const REDUCED_MOTION = matchMedia("(prefers-reduced-motion: reduce)");
let drainedAt = null;

for (let number = 0; number <= CLIENTS; number++) {
  const lane = make("div", number < CLIENTS ? "lane" : "lane own");
  lane.append(make("i"), make("b"));
  $("lanes").append(lane);
}

function setClients(now) {
  drainedAt = now.drained_at;
  clients.clear();
  for (const client of now.clients) clients.set(client.client, client);
  showLanes();
}

function startDrain(at) {
  drainedAt = at;
  for (const client of clients.values()) Object.assign(client, { state: "away", retryIn: 0 });
  // A page whose stream ended first gets this event when it is back. Then it is not disconnected any more.
  if (Date.now() - page.backAt > 2000) Object.assign(page, { state: "open", backAt: 0, announced: true });
  showLanes();
}

function updateClient(client) {
  if (client.client === null) {
    clients.clear();  // the clients left; their lanes stay until the next drain
    $("drain").disabled = false;
    return;
  }
  if (!clients.size) drainedAt = null;
  const before = clients.get(client.client);
  clients.set(client.client, { ...client, retryIn: client.retry ?? before?.retryIn });
  showLanes();
}

function updatePage(state) {
  if (state === "reconnecting" && page.state !== "away") Object.assign(page, { state: "away", lostAt: Date.now() });
  if (state === "open") {
    if (page.state === "away") Object.assign(page, { state: "back", backAt: Date.now() });
    else page.state = "open";
    page.announced = false;
  }
  showLanes();
}

function showLane(lane, state, afterMs, lineMs) {
  lane.classList.remove("open", "away", "back");
  lane.classList.add(state);
  lane.lastChild.style.left = `${Math.min(100, 100 * afterMs / SPAN_MS)}%`;
  lane.firstChild.style.width = `${Math.min(100, 100 * lineMs / SPAN_MS)}%`;
}

/* Shows the test clients; returns after how many milliseconds each one came back. */
function showClients() {
  const times = [];
  for (const [number, client] of clients) {
    const back = drainedAt !== null && client.state === "open" && client.at > drainedAt;
    const time = back ? client.at - drainedAt : 0;
    if (back) times.push(time);
    const line = back ? time : client.state === "away" && client.retryIn ? client.retryIn : 0;
    showLane($("lanes").children[number], back ? "back" : client.state, time, line);
  }
  return times;
}

function showLanes() {
  const times = showClients();
  const pageTime = page.state === "back" && drainedAt !== null ? page.backAt - page.lostAt : 0;
  showLane($("lanes").lastChild, drainedAt === null ? "open" : page.state || "open", pageTime, pageTime);
  if (page.state === "away") {
    const soFar = Math.min(SPAN_MS, Date.now() - page.lostAt);
    showLane($("lanes").lastChild, "away", 0, soFar);
    if (soFar < SPAN_MS && !REDUCED_MOTION.matches) requestAnimationFrame(showLanes);
    if (page.announced) setVerdict("drained", "All streams ended, this page’s too. The result follows when the page is back.", "wait");
    return;
  }
  if (!clients.size) return;
  const open = [...clients.values()].filter((client) => client.state === "open").length;
  if (drainedAt === null) {
    setVerdict("drained", `${open} of ${CLIENTS} test clients connected`);
  } else if (times.length < CLIENTS) {
    setVerdict("drained", `All streams ended: ${times.length} of ${CLIENTS} clients are back`, "wait");
  } else {
    $("drain").disabled = false;
    const own = pageTime ? `; this page (lowest dot) after ${formatSeconds(pageTime)}` : "";
    const [first, last] = [Math.min(...times), Math.max(...times)].map(formatSeconds);
    setVerdict("drained", `All ${CLIENTS} clients are back, after ${first} to ${last}${own}`, "good");
  }
  $("lanes").setAttribute("aria-label", `When each client reconnected: ${$("drained").textContent}`);
}

$("drain").addEventListener("click", async () => {
  $("drain").disabled = true;
  setTimeout(() => { $("drain").disabled = false; }, ENABLE_AFTER_MS);
  try {
    await sendPost("drain");
  } catch (error) {
    setVerdict("drained", error.message, "bad");
  }
});

/* The streams of the server */

const MAX_ENDED_ROWS = 30;
const endedRows = [];  // the latest first; neighbours with the same path and reason share a row

function makeRow({ path, streams: number, age, events, bytes }, state) {
  const row = make("tr");
  const pathCell = make("td", "", path);
  if (number > 1) pathCell.append(make("small", "", ` × ${number}`));
  const stateCell = make("td");
  stateCell.append(make("span", state, state.replace("_", " ")));
  const ageText = age < 100 ? `${age.toFixed(1)} s` : `${Math.round(age)} s`;
  row.append(pathCell, stateCell, make("td", "", ageText), make("td", "", events), make("td", "", formatBytes(bytes)));
  return row;
}

function showStreams({ rows, open, opened, ended }) {
  if (ended) {  // a new state of all parts, after which the ended streams are added again
    endedRows.length = 0;
    $("ended").replaceChildren();
  }
  setText("open", open);
  setText("opened", opened);
  $("running").replaceChildren(...rows.map((stream) => makeRow(stream, stream.state)));
}

function addEnded(stream) {
  const body = $("ended");
  const latest = endedRows[0];
  if (latest && latest.path === stream.path && latest.reason === stream.reason) {
    latest.streams += stream.streams;
    latest.age = Math.max(latest.age, stream.age);
    latest.events += stream.events;
    latest.bytes += stream.bytes;
    body.firstChild.replaceWith(makeRow(latest, latest.reason));
    return;
  }
  endedRows.unshift({ ...stream });
  body.prepend(makeRow(stream, stream.reason));
  if (endedRows.length > MAX_ENDED_ROWS) {
    endedRows.pop();
    body.lastChild.remove();
  }
}

/* The load of the machine */

const WINDOW_MS = 60000;
const GAP_MS = 3000;  // two samples that are further apart are not joined by a line
const setBar = (element, percent) => { element.style.transform = `translateX(${percent - 100}%)`; };
const formatPercent = (value) => `${Math.round(value)} %`;
let samples = [];

function formatBytes(value) {
  let unit = 0;
  for (; value >= 1000 && unit < 5; unit++) value /= 1024;
  return `${value.toFixed(unit && value < 100 ? 1 : 0)} ${["B", "KiB", "MiB", "GiB", "TiB", "PiB"][unit]}`;
}

function showFigures({ at, cpu, memory, network, load, rss }) {
  const mean = cpu.reduce((sum, value) => sum + value, 0) / (cpu.length || 1);
  // The server's clock places the samples, because missed ones arrive all at once. The clock may be set back.
  samples = samples.filter((sample) => Math.abs(at - sample.at) <= WINDOW_MS);
  samples.push({ at, cpu: mean, in: network?.in ?? 0, out: network?.out ?? 0 });
  setText("cpu", formatPercent(mean));
  showCores(cpu);
  plot("cpu", at, 100);
  setText("memory", `${formatBytes(memory.used)} of ${formatBytes(memory.total)}`);
  setBar($("memory-bar"), memory.percent);
  for (const name of ["in", "out", "loopback"]) setText(name, network ? `${formatBytes(network[name])}/s` : "unknown");
  const peak = Math.max(1024, ...samples.map((sample) => Math.max(sample.in, sample.out)));
  plot("in", at, peak);
  plot("out", at, peak);
  setText("load", load ? load.map((value) => value.toFixed(2)).join(" · ") : "unknown");
  setText("rss", formatBytes(rss));
}

function showCores(values) {
  const list = $("cores");
  while (list.children.length > values.length) list.lastChild.remove();
  while (list.children.length < values.length) {
    const core = make("li");
    core.append(make("i"));
    list.append(core);
  }
  values.forEach((value, index) => {
    list.children[index].title = `Core ${index}: ${formatPercent(value)}`;
    setBar(list.children[index].firstChild, value);
  });
}

/* Draws one value of the samples; `top` is the value at the upper edge. */
function plot(name, now, top) {
  let outline = "", fill = "", points = [];
  samples.forEach((sample, index) => {
    points.push(`${(60 - (now - sample.at) / 1000).toFixed(2)} ${(100 - 100 * sample[name] / top).toFixed(2)}`);
    const next = samples[index + 1];
    if (next && next.at - sample.at < GAP_MS) return;
    outline += `M${points.join("L")}`;
    fill += `M${points[0].split(" ")[0]} 100L${points.join("L")}V100Z`;
    points = [];
  });
  $(`${name}-line`).setAttribute("d", outline);
  $(`${name}-fill`)?.setAttribute("d", fill);
}

live.open("live");
