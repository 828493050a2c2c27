// A growing reply: read from a request of its own (ui/reply_stream.py), and drawn as fast as the
// browser can beside everything else.
(() => {
  "use strict";
  const desk = window.LMDESK;
  const RETRY_MS = 1000;
  const RETRIES = 30; // so long the server goes on with a reply that nobody looks at
  // A connection that was cut can leave Gradio waiting for ever for an event's answer.
  const LOST_MS = 10000;

  const press = (id) => document.querySelector(`#${id}`)?.click();
  const sleep = (ms) => new Promise((done) => setTimeout(done, ms));
  const nextFrame = () => new Promise((done) => requestAnimationFrame(done));

  // Drawing takes longer the longer the text is. Frames that come meanwhile are left out, and as
  // much time as one took is everything else's.
  let wanted = null;
  let drawing = false;
  const draw = async () => {
    drawing = true;
    while (wanted) {
      const began = performance.now();
      desk.reply = wanted;
      wanted = null;
      press("draw-reply");
      await nextFrame();
      await sleep(0);
      await sleep(performance.now() - began);
    }
    drawing = false;
  };

  // The stream that is being read. `begun`: it has brought something. `over`: its reply has ended.
  // `asked`: the event that asks for the reply is under way; what it shows comes before the end.
  // `broke`: it was cut off and taken up again.
  let stream = null;

  const read = async (mine, wait) => {
    const texts = { thoughts: "", live: "" };
    const url = `${desk.origin()}/page/reply/${desk.conversationId()}?wait=${wait}`;
    const answer = await fetch(url, { signal: mine.abort.signal, cache: "no-store" });
    if (!answer.ok) return;
    const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
    let rest = "";
    let begun = false; // nothing at all means that there is no reply, or not any more
    for (;;) {
      const { done, value } = await reader.read();
      if (done && begun) throw new Error("The reply broke off.");
      if (done) return;
      const lines = (rest + value).split("\n");
      rest = lines.pop();
      for (const line of lines) {
        const { set, add, ended } = JSON.parse(line);
        mine.begun = begun = true;
        if (ended) return;
        Object.assign(texts, set);
        for (const name of Object.keys(add || {})) texts[name] += add[name];
      }
      if (lines.length && mine === stream) {
        wanted = [texts.thoughts, texts.live];
        if (!drawing) draw();
      }
    }
  };

  const follow = async (asked) => {
    const mine = stream = { abort: new AbortController(), begun: false, over: false, asked };
    for (let tries = 0; tries < RETRIES && mine === stream && !mine.over; tries += 1) {
      try {
        await read(mine, asked && !tries);
        mine.over = true;
      } catch {
        mine.broke = true;
        if (mine === stream) await sleep(RETRY_MS);
      }
    }
    if (mine !== stream) return false;
    mine.over = true;
    if (mine.begun && mine.asked) {
      await sleep(LOST_MS);
      if (mine === stream && mine.asked) location.reload();
    }
    return mine === stream && end();
  };

  // Show the turn that the reply has become, after all that the event has shown that asked for it.
  const end = () => {
    if (!stream?.over || stream.asked) return false;
    const { begun, broke } = stream;
    stream = wanted = null;
    if (begun) show(broke);
    return begun;
  };

  let showing = 0; // how often it was asked for
  let shown = 0; // the last of them that was answered
  const show = async (unsure) => {
    const mine = showing += 1;
    press("show-reply");
    if (!unsure) return;
    await sleep(LOST_MS);
    if (shown < mine) location.reload();
  };
  desk.shown = () => { shown = showing; };

  const isGrowing = () => document.querySelector("button#stop"); // as the page shows it

  // Follow the reply that the open chat is getting; if there is none any more, show what became of it.
  const catchUp = async (isDue) => {
    const chat = desk.conversationId();
    const followed = await follow(false);
    if (!followed && !stream && chat === desk.conversationId() && isDue()) show();
  };

  // The button comes with the answer to the event, perhaps after the reply's first words.
  desk.stopReply = async () => {
    while (stream?.asked && !document.querySelector("button#stop")) await sleep(20);
    document.querySelector("button#stop")?.click();
  };

  desk.unfollow = () => {
    stream?.abort.abort();
    stream = wanted = null;
  };
  desk.asking = () => {
    if (!stream) follow(true);
  };
  desk.asked = () => {
    if (stream?.begun) {
      stream.asked = false;
      end();
      return;
    }
    desk.unfollow(); // perhaps none began
    catchUp(() => true);
  };
  // The reply may have ended since the event that opened the chat has looked.
  desk.opened = () => {
    if (!stream) catchUp(isGrowing);
  };
})();
