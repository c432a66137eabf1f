"use strict";
(() => {
  const all = (selector, root = document) => [...root.querySelectorAll(selector)];
  const search = document.getElementById("search");
  const sort = document.getElementById("sort");
  const count = document.getElementById("count");
  const nothing = document.getElementById("nothing");
  const lists = all(".list");
  const listed = new Map(lists.map((list) => [list, all(":scope > .item", list)]));
  const items = lists.flatMap((list) => listed.get(list));
  const links = new Map(all("nav a[href^='#latent-']").map((a) => [a.hash.slice(1), a]));
  const anchors = new Map(items.map((item) => [item, all(".anchor", item).map((one) => one.id)]));
  const texts = new Map();
  let here = null;
  let token = null;

  for (const one of all(".script")) one.hidden = false;

  const textOf = (item) => {
    if (!texts.has(item)) {
      const parts = all("[data-search]", item).map((part) => part.textContent);
      texts.set(item, parts.join("\n").toLowerCase());
    }
    return texts.get(item);
  };

  const matches = (item, wanted) => {
    if (token !== null && !item.dataset.at.split(" ").includes(token)) return false;
    if (!wanted) return true;
    if (/^#\d+$/.test(wanted)) return anchors.get(item).some((id) => id.endsWith("-" + wanted.slice(1)));
    return textOf(item).includes(wanted);
  };

  const visible = () => lists.flatMap((list) => [...list.children]).filter(
    (one) => one.classList.contains("item") && !one.hidden);

  const show = () => {
    const wanted = search.value.trim().toLowerCase();
    let n = 0;
    for (const item of items) {
      item.hidden = !matches(item, wanted);
      n += !item.hidden;
      for (const id of anchors.get(item)) links.get(id).hidden = item.hidden;
    }
    count.textContent = n === items.length ? `${n} shown` : `${n} of ${items.length}`;
    nothing.hidden = n > 0;
  };

  const arrange = () => {
    const key = sort.value.replace("-", "");
    const sign = sort.value.startsWith("-") ? -1 : 1;
    for (const list of lists) {
      const order = [...listed.get(list)];
      if (key) order.sort((a, b) => sign * (a.dataset[key] - b.dataset[key]));
      list.append(...order);
      const before = order.flatMap((item) => anchors.get(item)).map((id) => links.get(id));
      const heading = document.querySelector(`nav .part[href="#${list.parentElement.id}"]`);
      if (heading) heading.after(...before);
      else if (before.length) before[0].parentElement.append(...before);
    }
  };

  const mark = (item) => {
    if (here) {
      here.classList.remove("here");
      for (const id of anchors.get(here)) links.get(id).classList.remove("here");
    }
    here = item;
    if (!item) return;
    item.classList.add("here");
    for (const id of anchors.get(item)) {
      links.get(id).classList.add("here");
      const nav = links.get(id).closest("nav");
      if (nav.scrollHeight > nav.clientHeight) links.get(id).scrollIntoView({ block: "nearest" });
    }
  };

  const go = (item) => {
    mark(item);
    history.replaceState(null, "", "#" + anchors.get(item)[0]);
    item.scrollIntoView({ block: "start" });
    item.focus({ preventScroll: true });
  };

  const step = (by) => {
    const shown = visible();
    if (!shown.length) return;
    const at = shown.indexOf(here);
    go(shown[at < 0 ? (by > 0 ? 0 : shown.length - 1) : Math.min(Math.max(at + by, 0), shown.length - 1)]);
  };

  const follow = () => {
    const target = document.getElementById(location.hash.slice(1));
    const item = target && target.closest(".item");
    if (!item) return;
    if (item.hidden) {
      search.value = "";
      choose(null);
    }
    mark(item);
    target.scrollIntoView({ block: "start" });
  };

  const choose = (which) => {
    token = which;
    for (const one of all(".t")) one.setAttribute("aria-pressed", String(one.dataset.t === which));
    show();
  };

  for (const one of all(".t")) {
    one.setAttribute("role", "button");
    one.tabIndex = 0;
    const toggle = () => choose(token === one.dataset.t ? null : one.dataset.t);
    one.addEventListener("click", toggle);
    one.addEventListener("keydown", (event) => {
      if (event.key === "Enter" || event.key === " ") {
        event.preventDefault();
        toggle();
      }
    });
  }
  search.addEventListener("input", show);
  sort.addEventListener("change", arrange);
  window.addEventListener("hashchange", follow);
  document.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    if (event.target === search) {
      if (event.key === "Escape") {
        search.value = "";
        show();
        search.blur();
      } else if (event.key === "Enter") {
        search.blur();
        step(1);
      }
      return;
    }
    if (event.target.closest("select, input")) return;
    if (event.key === "j") step(1);
    else if (event.key === "k") step(-1);
    else if (event.key === "/") {
      event.preventDefault();
      search.focus();
      search.select();
    }
  });
  show();
  follow();
})();
