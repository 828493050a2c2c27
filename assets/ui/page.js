// The page's own script: conversation id, status bar, stats under replies, scrolling, Esc.
// Settings and texts come from window.LMDESK, written by ui/theme.py.
(() => {
  "use strict";
  const desk = window.LMDESK;
  const POLL_MS = 2000;

  const texts = (() => {
    const wishes = (navigator.languages || [navigator.language]).map((l) => l.toLowerCase());
    for (const wish of wishes) {
      for (const locale of Object.keys(desk.messages)) {
        if (locale.toLowerCase() === wish || locale.split("-")[0] === wish.split("-")[0]) {
          return { ...desk.messages[desk.fallback], ...desk.messages[locale] };
        }
      }
    }
    return desk.messages[desk.fallback];
  })();
  const text = (key, values = {}) =>
    (texts[key] || key).replace(/\{(\w+)\}/g, (_, name) => values[name]);

  // One conversation per browser tab; sessionStorage survives a reload, and is not shared.
  desk.conversationId = () => {
    const key = `lmdesk.${desk.instance}.conversation`;
    let id = sessionStorage.getItem(key);
    if (!id) {
      const bytes = crypto.getRandomValues(new Uint8Array(16));
      id = Array.from(bytes, (b) => b.toString(16).padStart(2, "0")).join("");
      sessionStorage.setItem(key, id);
    }
    return id;
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

  const showStatus = (status) => {
    gauge("model", status.model || "", "");
    gauge("state", text(`state.${status.state}`), "");
    gauge("detail", status.state === "ready" ? "" : status.detail || "", "", status.detail || "");
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
    gauge("memory", memory ? text("memory", {
      used: size(memory.used), total: size(memory.total) }) : "",
      memory?.total ? memory.used / memory.total : "",
      memory ? text("weights", { weights: size(memory.weights), kv: size(memory.kv_cache),
        engine: size(memory.engine) }) : "");
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
    const root = (window.gradio_config?.root || location.origin + location.pathname)
      .replace(/\/+$/, "");
    try {
      const answer = await fetch(`${root}/api/status`, { cache: "no-store" });
      if (answer.status === 401) showStatus({ state: "denied" });
      else if (answer.ok) showStatus(await answer.json());
      else showStatus({ state: "offline" });
    } catch {
      showStatus({ state: "offline" });
    }
  };
  setInterval(poll, POLL_MS);
  document.addEventListener("visibilitychange", poll);

  // Chat

  // The lines are CSS content of the reply's row: Gradio owns the elements, we only mark them.
  const writeStats = () => {
    const data = document.querySelector("#turn-stats [data-lines]");
    const lines = data ? JSON.parse(data.dataset.lines) : [];
    document.querySelectorAll("#chat .message-row.bot-row").forEach((row, i) => {
      const line = lines[i] || "";
      if (row.dataset.stats !== line) row.dataset.stats = line;
    });
  };

  let follow = true; // the thread's end is in sight, keep it there
  const watchThread = (thread) => {
    thread.addEventListener("scroll", () => {
      follow = thread.scrollHeight - thread.scrollTop - thread.clientHeight < 80;
    });
    new MutationObserver(() => {
      writeStats();
      if (follow) thread.scrollTop = thread.scrollHeight;
    }).observe(thread, { childList: true, subtree: true, characterData: true, attributes: true,
      attributeFilter: ["data-lines"] });
    writeStats();
  };

  document.addEventListener("keydown", (event) => {
    const stop = document.querySelector("button#stop");
    if (event.key === "Escape" && stop && stop.offsetParent !== null) stop.click();
  });

  const started = setInterval(() => {
    const thread = document.querySelector("#thread");
    const bar = document.querySelector("#status-bar .lmd-bar");
    if (!thread || !bar) return;
    clearInterval(started);
    watchThread(thread);
    poll();
  }, 100);
})();
