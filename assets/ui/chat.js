// The chat's script: which conversation a browser tab shows, versions and stats under replies,
// scrolling, keys, downloads.
(() => {
  "use strict";
  const desk = window.LMDESK;
  const text = desk.text;

  // One conversation per browser tab; sessionStorage survives a reload, and is not shared.
  const key = `lmdesk.${desk.instance}.conversation`;
  const newId = () => Array.from(
    crypto.getRandomValues(new Uint8Array(16)), (b) => b.toString(16).padStart(2, "0")).join("");
  desk.conversationId = () => {
    if (!sessionStorage.getItem(key)) sessionStorage.setItem(key, newId());
    return sessionStorage.getItem(key);
  };
  desk.showChat = () => document.querySelector("#show-chat").click();
  desk.openChat = (id) => {
    sessionStorage.setItem(key, id);
    desk.unfollow();
    showChats(false);
    desk.showChat();
  };
  desk.newChat = () => {
    desk.openChat(newId());
    document.querySelector("#message textarea")?.focus();
  };
  desk.origin = () => (window.gradio_config?.root || location.origin + location.pathname)
    .replace(/\/+$/, "");

  desk.download = (file) => {
    const { name, text: content } = JSON.parse(file);
    const link = document.createElement("a");
    link.href = URL.createObjectURL(new Blob([content], { type: "text/plain" }));
    link.download = name;
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 10000);
  };

  // Narrow screens: the list of chats comes when it is called.
  const showChats = (show) => {
    document.querySelector("#chat-page")?.classList.toggle("lmd-show-chats", show);
    document.querySelector("#toggle-chats")?.setAttribute("aria-expanded", show);
  };

  // Buttons that need no server, or not yet: each event of Gradio's makes the page slower to open.
  const pressed = {
    "new-chat": () => desk.newChat(),
    "delete-chat": () => {
      if (window.confirm(text("confirm_delete"))) document.querySelector("#delete-surely").click();
    },
    "toggle-chats": () =>
      showChats(!document.querySelector("#chat-page").classList.contains("lmd-show-chats")),
    "toggle-thoughts": (button) => {
      const open = document.querySelector("#live-reasoning").classList.toggle("lmd-open");
      button.setAttribute("aria-expanded", open);
    },
  };
  document.addEventListener("click", (event) => {
    const button = event.target.closest?.("button");
    if (button && Object.hasOwn(pressed, button.id)) pressed[button.id](button);
  });

  // Under each reply: its figures, as CSS content of its row, for Gradio owns what is in there;
  // and, where a turn has several versions, the way to the others.
  const versionBar = ({ ids, at }) => {
    const bar = document.createElement("div");
    bar.className = "lmd-versions";
    const steps = [[-1, "‹", text("previous_version")], [1, "›", text("next_version")]];
    for (const [step, sign, name] of steps) {
      const button = document.createElement("button");
      button.textContent = sign;
      button.setAttribute("aria-label", name);
      button.disabled = ids[at + step] === undefined;
      button.onclick = () => {
        desk.version = ids[at + step];
        document.querySelector("#pick-version").click();
      };
      bar.append(button);
    }
    const count = document.createElement("span");
    count.textContent = text("version", { at: at + 1, of: ids.length });
    bar.firstChild.after(count);
    return bar;
  };

  const writeStats = () => {
    const data = document.querySelector("#turn-stats [data-lines]")?.dataset;
    const lines = data ? JSON.parse(data.lines) : [];
    const versions = data ? JSON.parse(data.versions) : [];
    document.querySelectorAll('#chat [aria-label="Copy message"]').forEach((button) => {
      button.setAttribute("aria-label", text("copy_message")); // Gradio has no word of Chinese
    });
    document.querySelectorAll("#chat .message-row.bot-row").forEach((row, i) => {
      const line = lines[i] || "";
      if (row.dataset.stats !== line) row.dataset.stats = line;
      const several = versions[i]?.ids.length > 1;
      const state = several ? JSON.stringify(versions[i]) : "";
      if ((row.dataset.versions || "") === state) return;
      row.dataset.versions = state;
      row.querySelector(".lmd-versions")?.remove();
      if (several) row.append(versionBar(versions[i]));
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
      attributeFilter: ["data-lines", "data-versions"] });
    writeStats();
  };

  document.addEventListener("keydown", (event) => {
    if (event.key === "Escape") {
      const shown = (id) => document.querySelector(id)?.offsetParent;
      if (shown("button#compare-stop")) document.querySelector("button#compare-stop").click();
      if (shown("#chat-page")) desk.stopReply();
    }
    if (event.ctrlKey && event.shiftKey && event.key.toLowerCase() === "o") {
      event.preventDefault();
      document.querySelector("button#new-chat")?.click();
    }
  });

  // A narrow screen scrolls as a whole: the thread and the message box take what the bars leave.
  const watchBars = (bars) => {
    const measure = () => {
      const page = document.querySelector("#chat-page");
      if (!page.offsetParent) return; // another tab is shown
      const top = page.getBoundingClientRect().top +
        document.querySelector("main.contain").scrollTop;
      document.documentElement.style.setProperty("--lmd-top", `${Math.round(top)}px`);
    };
    new ResizeObserver(measure).observe(bars);
    measure();
  };

  const started = setInterval(() => {
    const thread = document.querySelector("#thread");
    const bars = document.querySelector("#status-row");
    if (!thread || !bars) return;
    clearInterval(started);
    watchThread(thread);
    watchBars(bars);
  }, 100);
})();
