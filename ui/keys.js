// Keyboard of the chat page: 1-8 pick, T tie, N none good, E edit, / write. Loaded in <head>; no dependencies.
(() => {
  const LETTERS = { t: "tie", n: "none", e: "edit", u: "undo", r: "retry" };
  const composer = () => document.querySelector("#composer textarea");
  const typing = (node) => node && (node.isContentEditable || /^(input|textarea|select)$/i.test(node.tagName));

  // Single keys can be switched off, in this browser: speech input types them unasked.
  const KEYS = "plaudit.keys";
  const off = () => localStorage.getItem(KEYS) === "off";

  function toggle(event) {
    if (!event.target.closest || !event.target.closest("#single-keys")) return;
    localStorage.setItem(KEYS, off() ? "on" : "off");
    showKeys();
  }

  function showKeys() {
    const button = document.querySelector("#single-keys");
    if (button && button.getAttribute("aria-pressed") !== String(!off())) button.setAttribute("aria-pressed", String(!off()));
    document.documentElement.classList.toggle("no-keys", off());
  }

  function press(event) {
    if (off()) return;
    if (event.ctrlKey || event.metaKey || event.altKey || event.isComposing) return;
    const node = event.target;
    if (typing(node)) {
      if (event.key === "Escape") node.blur();
      return;
    }
    const key = event.key.toLowerCase();
    let found = null;
    if (key >= "1" && key <= "8") found = document.querySelector(`#exchange button[data-act="pick"][data-index="${+key - 1}"]`);
    else if (LETTERS[key]) {
      const act = `[data-act="${LETTERS[key]}"]:not(.card)`;
      const card = node.closest && node.closest(".card");
      found = (card && card.querySelector(act)) || document.querySelector(`#exchange .chosen ${act}`) ||
        document.querySelector(`#exchange .choices ${act}`) || (key === "r" && document.querySelector('#exchange [data-act="shorter"]'));
    } else if (key === "/") {
      if (composer()) composer().focus();
      event.preventDefault();
    }
    if (found) {
      event.preventDefault();
      found.click();
    }
  }

  // What is in the box outlives a reload and a look at another page, in this tab: nobody has it but the browser.
  const BOX = "plaudit.box";
  let shown = null;
  function keep(event) {
    if (event.target === composer()) sessionStorage.setItem(BOX, event.target.value);
  }

  // So does the conversation: its id is kept, and the page asks for it when it is loaded again. Beginning another forgets it.
  const OPEN = "plaudit.open";
  let known = false;
  function remember() {
    const exchange = document.querySelector("section.exchange");
    const box = composer();
    if (box && box === shown && !box.value) sessionStorage.removeItem(BOX);  // sent or deleted, perhaps while nobody looked
    if (exchange && exchange.dataset.conversation) {
      known = true;
      sessionStorage.setItem(OPEN, exchange.dataset.conversation);
    } else if (known && document.querySelector("section.welcome")) {
      known = false;
      sessionStorage.removeItem(OPEN);
    }
  }

  function giveBack() {
    const box = composer();
    if (!box || box === shown) return;
    shown = box;
    const kept = sessionStorage.getItem(BOX);
    if (!kept || box.value) return;
    box.value = kept;
    box.dispatchEvent(new Event("input", { bubbles: true }));
  }

  // After sending, the keys pick: leave the box. It stays focused on what was typed when nothing was sent.
  function sent(event) {
    const box = composer();
    if (!box || !box.value.trim() || document.querySelector('#exchange [data-phase="streaming"]')) return;
    const entered = event.type === "keydown" && event.target === box && event.key === "Enter" && !event.shiftKey;
    const clicked = event.type === "click" && event.target.closest && event.target.closest("#send");
    if (!((entered && !event.isComposing) || clicked)) return;
    setTimeout(() => box.blur(), 30);
  }

  // On a phone the list lies over the page: a conversation that was chosen there is what one wants to see.
  function chosen(event) {
    if (!event.target.closest || !event.target.closest("#fresh, #history .open") || !matchMedia("(max-width: 768px)").matches) return;
    const close = document.querySelector("#sidebar.open .toggle-button, .sidebar.open .toggle-button");
    if (close) close.click();
  }

  // Times are the server's; show them on the reader's own clock.
  function localTimes(root) {
    for (const node of root.querySelectorAll("time[datetime]")) {
      const when = new Date(node.getAttribute("datetime"));
      if (isNaN(when)) continue;
      const clock = when.toLocaleTimeString([], { hour: "2-digit", minute: "2-digit", hour12: false });
      const today = when.toDateString() === new Date().toDateString();
      const text = today ? clock : `${when.toLocaleDateString([], { day: "numeric", month: "short" })} ${clock}`;
      if (node.textContent !== text) node.textContent = text;
    }
  }

  // New replies and the panel to write one come into view by themselves.
  let phase = "";
  let sheets = 0;
  function follow() {
    const open = [...document.querySelectorAll("#editor, #confirm")].filter((node) => node.offsetHeight > 0);
    if (open.length > sheets) {
      open[0].scrollIntoView({ block: "center" });
      const first = open[0].querySelector("textarea, button");
      if (first) first.focus({ preventScroll: true });
    }
    sheets = open.length;
    const exchange = document.querySelector("#exchange [data-phase]");
    const now = exchange ? exchange.dataset.phase + exchange.dataset.turn : "";
    if (now && now !== phase && exchange.dataset.phase === "streaming") {
      const calm = matchMedia("(prefers-reduced-motion: reduce)").matches;
      exchange.scrollIntoView({ block: "start", behavior: calm ? "auto" : "smooth" });
    }
    phase = now;
  }

  document.addEventListener("keydown", press);
  document.addEventListener("keydown", sent, true);
  document.addEventListener("click", sent, true);
  document.addEventListener("click", toggle);
  document.addEventListener("click", chosen, true);
  document.addEventListener("input", keep, true);
  let queued = false;
  new MutationObserver(() => {
    if (queued) return;
    queued = true;
    requestAnimationFrame(() => {
      queued = false;
      localTimes(document);
      showKeys();
      giveBack();
      remember();
      follow();
    });
  }).observe(document.documentElement, { childList: true, subtree: true, characterData: true });
  document.documentElement.lang = "en";
})();
