// Open pages in headless Chromium as readers do, and say what is wrong with them.
//
//     node pages.mjs CHROMIUM MODULES SHOTS PAGE.html ...
//
// Each page at desktop and phone width, light and dark: no console message, no uncaught error, no
// request but the file itself, nothing that scrolls the page sideways, no violation that axe-core
// knows (all its rules, every <details> open), every control reached by Tab with a visible focus.
// Prints a JSON list of {page, view, fault}; pictures and a printed PDF go to SHOTS, "-" for none.

import { mkdirSync, readFileSync } from "node:fs";
import { createRequire } from "node:module";
import { basename, join, resolve } from "node:path";
import { pathToFileURL } from "node:url";

const [chromium, modules, shots, ...pages] = process.argv.slice(2);
const require = createRequire(join(resolve(modules), "x.js"));
const puppeteer = require("puppeteer-core");
const axe = readFileSync(require.resolve("axe-core/axe.min.js"), "utf-8");
const WIDTHS = { desktop: [1280, 900], phone: [390, 844] };
const TABS = 400; // Tab presses at most: enough for every control of a report

const faults = [];
const browser = await puppeteer.launch({
  executablePath: chromium,
  args: ["--no-sandbox", "--disable-gpu", "--hide-scrollbars"],
});
try {
  for (const file of pages) {
    for (const [name, [width, height]] of Object.entries(WIDTHS)) {
      for (const scheme of ["light", "dark"]) {
        await look(file, `${name}-${scheme}`, { width, height, scheme });
      }
    }
  }
} finally {
  await browser.close();
}
console.log(JSON.stringify(faults, null, 1));
process.exit(faults.length ? 1 : 0);

async function look(file, view, { width, height, scheme }) {
  const page = await browser.newPage();
  const say = (fault) => faults.push({ page: basename(file), view, fault });
  const url = pathToFileURL(resolve(file)).href;
  page.on("console", (message) => say(`console ${message.type()}: ${message.text()}`));
  page.on("pageerror", (error) => say(`uncaught ${error.message}`));
  page.on("request", (request) => {
    const asked = request.url();
    if (asked.split("#")[0] !== url && !asked.startsWith("data:")) say(`request of ${asked}`);
  });
  await page.setViewport({ width, height, isMobile: view.startsWith("phone") });
  await page.emulateMediaFeatures([{ name: "prefers-color-scheme", value: scheme }]);
  await page.goto(url, { waitUntil: "load" });
  if (shots !== "-") await picture(page, file, view);
  await keyboard(page, say);
  await page.evaluate(() => document.querySelectorAll("details").forEach((d) => (d.open = true)));
  const wide = await page.evaluate(() => document.documentElement.scrollWidth - innerWidth);
  if (wide > 0) say(`the page scrolls sideways by ${wide} px`);
  await page.evaluate(axe);
  const found = await page.evaluate(() => window.axe.run({ resultTypes: ["violations"] }));
  for (const { id, help, nodes } of found.violations) {
    const first = nodes[0];
    const why = (first.any[0] ?? first.all[0] ?? first.none[0])?.message ?? "";
    say(`axe ${id}: ${help} (${nodes.length} places, such as ${first.html.slice(0, 160)}: ${why})`);
  }
  await page.close();
}

async function picture(page, file, view) {
  mkdirSync(shots, { recursive: true });
  const stem = join(shots, `${basename(file, ".html")}-${view}`);
  await page.screenshot({ path: `${stem}.png` });
  await page.screenshot({ path: `${stem}-whole.png`, fullPage: true });
  if (view === "desktop-light") await page.pdf({ path: `${stem}.pdf`, format: "A4" });
}

// Tab through the page: all that can be focused gets its turn, and shows that it has it.
async function keyboard(page, say) {
  const stops = await page.evaluate(() => {
    const asks = "a[href], button, input, select, textarea, summary, [tabindex]";
    const seen = (e) => e.checkVisibility() && e.tabIndex >= 0 && !e.disabled;
    const all = [...document.querySelectorAll(asks)].filter(seen);
    // of a group of radio buttons Tab reaches one
    const rest = all.filter((e) => e.type !== "radio" || e.checked);
    rest.forEach((e, k) => (e.dataset.stop = k));
    return rest.length;
  });
  const reached = new Set();
  for (let k = 0; k < Math.min(stops, TABS); k++) {
    await page.keyboard.press("Tab");
    const here = await page.evaluate(() => {
      const e = document.activeElement;
      const style = getComputedStyle(e);
      const ring = parseFloat(style.outlineWidth) > 0 && style.outlineStyle !== "none";
      return { stop: e.dataset.stop, ring, html: e.outerHTML.slice(0, 120) };
    });
    if (here.stop !== undefined) reached.add(here.stop);
    if (here.stop !== undefined && !here.ring) say(`no visible focus on ${here.html}`);
  }
  if (reached.size < Math.min(stops, TABS)) {
    say(`Tab reaches ${reached.size} of ${stops} controls`);
  }
}
