// The page's own script: language and status bar; chat.js has the chat's.
// Settings and texts come from window.LMDESK, written by ui/theme.py.
(() => {
  "use strict";
  const desk = window.LMDESK;
  const POLL_MS = 2000;

  // ui/language.py makes the chosen language the navigator's, ui/i18n.py answers in it.
  const LANGUAGE = "lmdesk_language";

  let locale = desk.fallback;
  const texts = (() => {
    const wishes = (navigator.languages || [navigator.language]).map((l) => l.toLowerCase());
    for (const wish of wishes) {
      for (const name of Object.keys(desk.messages)) {
        if (name.toLowerCase() === wish || name.split("-")[0] === wish.split("-")[0]) {
          locale = name;
          return { ...desk.messages[desk.fallback], ...desk.messages[name] };
        }
      }
    }
    return desk.messages[desk.fallback];
  })();
  const text = (key, values = {}) =>
    (texts[key] || key).replace(/\{(\w+)\}/g, (_, name) => values[name]);
  desk.text = text;
  document.documentElement.lang = locale;

  const fillLanguages = () => {
    const select = document.querySelector("#status-bar .lmd-language");
    if (!select || select.options.length) return;
    for (const name of Object.keys(desk.messages)) {
      const words = new Intl.DisplayNames([name], { type: "language" }).of(name.split("-")[0]);
      select.add(new Option(words, name, name === locale, name === locale));
    }
    select.setAttribute("aria-label", text("language"));
    select.addEventListener("change", () => {
      document.cookie = `${LANGUAGE}=${select.value}; path=/; max-age=31536000; samesite=lax`;
      location.reload();
    });
  };

  // Status bar

  const size = (bytes) => {
    const units = ["B", "KB", "MB", "GB", "TB"];
    let power = 0;
    while (bytes >= 1000 && power < units.length - 1) {
      bytes /= 1024;
      power += 1;
    }
    return `${bytes >= 100 || power === 0 ? Math.round(bytes) : bytes.toFixed(1)} ${units[power]}`;
  };

  const gauge = (slot, label, share, hint = "") => {
    const element = document.querySelector(`#status-bar [data-status="${slot}"]`);
    if (!element) return;
    element.textContent = label;
    element.title = hint;
    element.style.setProperty("--share", share);
    element.classList.toggle("lmd-has-share", share !== "");
  };

  const root = () => (window.gradio_config?.root || location.origin + location.pathname)
    .replace(/\/+$/, "");

  // The API's sentences are English. Ours is asked for once, and there when the bar is next drawn.
  const known = {};
  const inWords = (sentence) => {
    if (!sentence || locale === desk.fallback) return sentence;
    if (!(sentence in known)) {
      known[sentence] = sentence;
      fetch(`${root()}/page/sentence?text=${encodeURIComponent(sentence)}`)
        .then(async (answer) => { if (answer.ok) known[sentence] = await answer.text(); })
        .catch(() => delete known[sentence]);
    }
    return known[sentence];
  };

  const showStatus = (status) => {
    gauge("model", status.model || "", "");
    gauge("state", text(`state.${status.state}`), "");
    gauge("paused", status.paused ? text("paused") : "", "", text("paused_hint"));
    const detail = inWords(status.detail || "");
    gauge("detail", status.state === "unloaded" ? "" : detail, "", detail);
    const state = document.querySelector('#status-bar [data-status="state"]');
    if (state) state.dataset.state = status.state;
    const { info, stats, memory } = status;
    gauge("queue", stats ? text("queue", {
      running: stats.num_running, waiting: stats.num_waiting }) : "", "");
    if (info && stats && memory && info.num_blocks) {
      const share = 1 - (stats.num_blocks_free + stats.num_blocks_cached) / info.num_blocks;
      gauge("kv", text("kv", {
        used: `${Math.round(share * 100)} %`, total: size(memory.kv_cache) }), share,
        text("kv_fits", { tokens: (info.num_blocks * info.block_size).toLocaleString(),
          conversations: Math.floor(info.num_blocks * info.block_size / info.session_len),
          length: info.session_len.toLocaleString(), bits: info.kv_bits }));
    } else {
      gauge("kv", "", "");
    }
    showMemory(memory, info);
  };

  // Whose the device's memory is (backend/memory.py): the strip, its words for a screen reader, and
  // the same as a list. Elements are made once, so that nothing is read out, or closes, anew.
  const showMemory = (memory, info) => {
    const box = document.querySelector("#status-bar .lmd-memory-of");
    if (!box) return;
    box.hidden = !memory?.total;
    if (box.hidden) return;
    const values = { used: size(memory.used), total: size(memory.total) };
    gauge("memory", info && info.device !== "cpu" ? text("gpu_memory", values)
      : text("memory", values), "",
      text("weights", { weights: size(memory.weights), kv: size(memory.kv_cache),
        engine: size(memory.engine) }));
    const strip = box.querySelector(".lmd-parts");
    const list = box.querySelector("ul");
    const parts = Object.entries(memory.parts || {});
    if (strip.children.length !== parts.length) {
      strip.replaceChildren(...parts.map(([name]) => {
        const part = document.createElement("span");
        part.className = `lmd-part-${name}`;
        return part;
      }));
      list.replaceChildren(...parts.map(([name]) => {
        const row = document.createElement("li");
        row.className = `lmd-key-${name}`;
        row.append(text(`part.${name}`), document.createElement("b"));
        return row;
      }));
    }
    parts.forEach(([, bytes], i) => {
      strip.children[i].style.flexGrow = bytes / memory.total;
      strip.children[i].hidden = bytes === 0;
      list.children[i].querySelector("b").textContent = size(bytes);
    });
    const words = parts.map(([name, bytes]) => `${text(`part.${name}`)} ${size(bytes)}`).join(", ");
    if (strip.getAttribute("aria-label") !== words) strip.setAttribute("aria-label", words);
  };

  // Restful mode: /api/status tells of the default server; of another one the page knows only
  // whether it named a model when it was asked.
  let target = null;
  desk.showTarget = (url, model) => {
    target = url ? { state: model ? "ready" : "unreachable", model: model || url } : null;
    poll();
  };

  const poll = async () => {
    if (document.hidden) return;
    if (target) {
      showStatus(target);
      return;
    }
    try {
      const answer = await fetch(`${root()}/api/status`, { cache: "no-store" });
      if (answer.status === 401) showStatus({ state: "denied" });
      else if (answer.ok) showStatus(await answer.json());
      else showStatus({ state: "offline" });
    } catch {
      showStatus({ state: "offline" });
    }
  };
  setInterval(poll, POLL_MS);
  document.addEventListener("visibilitychange", poll);

  // Another tab, as if its name had been clicked. On a narrow screen Gradio puts the last ones into
  // a menu whose buttons have no ids; it keeps all names, in order, in a hidden row.
  desk.showTab = (id) => {
    const button = document.querySelector(`#tab-${id}-button`);
    if (button) return button.click();
    const places = [...document.querySelectorAll("#tabs > .tabitem")].map((tab) => tab.id);
    const names = document.querySelectorAll("#tabs .tab-container.visually-hidden button");
    const name = names[places.indexOf(`tab-${id}`)]?.textContent;
    const inMenu = document.querySelectorAll("#tabs .overflow-dropdown button");
    [...inMenu].find((choice) => choice.textContent === name)?.click();
  };

  const started = setInterval(() => {
    const bar = document.querySelector("#status-bar .lmd-bar");
    if (!bar) return;
    clearInterval(started);
    fillLanguages();
    poll();
  }, 100);
})();
