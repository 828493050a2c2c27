// A calibration text of the reader's own: read by the browser, so that no file is ever uploaded.
(() => {
  "use strict";
  const desk = window.LMDESK;
  const MOST_BYTES = 16_000_000; // the server counts characters: ui/quantize_form.py

  const problem = (words) => {
    const line = document.createElement("p");
    line.className = "lmd-problem";
    line.setAttribute("role", "alert");
    line.textContent = words;
    return { __type__: "update", value: line.outerHTML, visible: true };
  };
  const nothing = { __type__: "update", value: "", visible: false };

  // Returns [text, note]; the text stays as it is where nothing was chosen.
  desk.pickText = (before) => new Promise((resolve) => {
    const input = document.createElement("input");
    input.type = "file";
    input.accept = ".txt,.jsonl,text/plain";
    input.addEventListener("cancel", () => resolve([before, nothing]));
    input.addEventListener("change", async () => {
      const file = input.files[0];
      if (!file) return resolve([before, nothing]);
      if (file.size > MOST_BYTES) {
        return resolve([before, problem(desk.text("text_too_large", { name: file.name }))]);
      }
      try {
        const decoder = new TextDecoder("utf-8", { fatal: true });
        return resolve([decoder.decode(await file.arrayBuffer()), nothing]);
      } catch {
        return resolve([before, problem(desk.text("text_not_utf8", { name: file.name }))]);
      }
    });
    input.click();
  });
})();
