/** The lab as a person meets it, in JupyterLab's own test harness: a real server, a real kernel, the demo model. */
import { expect, IJupyterLabPageFixture, test } from '@jupyterlab/galata';

const NOTEBOOK = 'two_runs.ipynb';
const PANEL = '#tuft-panel';
const READING = `${PANEL} .jp-Tuft-reading`;
const VIEW = '.jp-Tuft-view';
const WIDGET = '.jp-OutputArea-output .tuft-widget';
const HALF_WAY = 10;
const LAST_STEP = 30;

const THEMES = {
  light: 'JupyterLab Light',
  dark: 'JupyterLab Dark',
  contrast: 'JupyterLab Dark High Contrast'
};

type Lab = IJupyterLabPageFixture;

/** What a person types into the command palette, and takes. */
async function command(page: Lab, label: string): Promise<void> {
  await page.keyboard.press('Control+Shift+C');
  await page.locator('.lm-CommandPalette-input').fill(label);
  const item = page.locator('.lm-CommandPalette-item', { hasText: label });
  await item.first().click();
}

/** The step that the panel says. */
async function step(page: Lab): Promise<number> {
  const text = await page.locator(READING).textContent();
  return Number(/step (\d+)/.exec(text ?? '')?.[1] ?? 0);
}

/** What is drawn on a chart. */
function picture(page: Lab, where: string): Promise<string> {
  const canvas = page.locator(`${where} canvas`).first();
  return canvas.evaluate(node => (node as HTMLCanvasElement).toDataURL());
}

/** How well the strongest colour drawn on a chart stands out from what lies under it (WCAG's ratio, 1 to 21). */
function contrast(page: Lab, where: string): Promise<number> {
  const canvas = page.locator(`${where} canvas`).first();
  return canvas.evaluate(node => {
    const light = (rgb: number[]) => {
      const [r, g, b] = rgb.map(value => {
        const c = value / 255;
        return c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4;
      });
      return 0.2126 * r + 0.7152 * g + 0.0722 * b;
    };
    let below: Element | null = node;
    let ground = [0, 0, 0, 0];
    while (below && ground[3] === 0) {
      const found = getComputedStyle(below).backgroundColor.match(/[\d.]+/g);
      const [r, g, b, a = 1] = (found ?? []).map(Number);
      ground = a ? [r, g, b, a] : ground;
      below = below.parentElement;
    }
    const { width, height } = node as HTMLCanvasElement;
    const drawn = (node as HTMLCanvasElement).getContext('2d')!;
    const { data } = drawn.getImageData(0, 0, width, height);
    const base = light(ground.slice(0, 3));
    let most = 1;
    for (let i = 0; i < data.length; i += 4) {
      const [r, g, b, a] = data.slice(i, i + 4);
      if (a === 255 && Math.max(r, g, b) - Math.min(r, g, b) > 60) {
        const ink = light([r, g, b]);
        const ratio =
          (Math.max(ink, base) + 0.05) / (Math.min(ink, base) + 0.05);
        most = Math.max(most, ratio);
      }
    }
    return most;
  });
}

test('the palette shows the panel, and the launcher has a card for each view', async ({
  page
}) => {
  await command(page, 'Show TuFT Panel');
  await expect(page.locator(`${PANEL} .jp-Tuft-head`)).toBeVisible();
  await expect(page.locator(PANEL)).toContainText('Nothing is being trained');
  for (const [name, shows] of [
    ['Compare Runs', VIEW],
    ['Playground', '.jp-Tuft-playground']
  ]) {
    await page.menu.clickMenuItem('File>New Launcher');
    const card = page.locator('.jp-LauncherCard:visible', { hasText: name });
    await card.click();
    await expect(page.locator(`${shows}:visible`)).toBeVisible();
  }
});

test('the curve moves while a notebook trains, two runs are compared, and every theme shows them', async ({
  page,
  tmpPath
}) => {
  const [from, to] = [`${__dirname}/${NOTEBOOK}`, `${tmpPath}/${NOTEBOOK}`];
  await page.contents.uploadFile(from, to);
  await page.notebook.open(NOTEBOOK);
  await page.notebook.activate(NOTEBOOK);
  await page.sidebar.openTab('tuft-panel');
  await page.sidebar.setWidth(360, 'left');
  const ran = page.notebook.run();

  await expect.poll(() => step(page)).toBe(HALF_WAY);
  const before = await picture(page, PANEL);
  await page.contents.uploadContent('', 'text', `${tmpPath}/looked-at`);
  await expect.poll(() => step(page)).toBeGreaterThan(HALF_WAY);
  await expect.poll(() => picture(page, PANEL)).not.toBe(before);
  expect(await ran).toBe(true);
  await expect(page.locator('.jp-OutputArea-output.jp-mod-error')).toHaveCount(
    0
  );
  await expect.poll(() => step(page)).toBe(LAST_STEP);

  const cards = page.locator(`${PANEL} .jp-Tuft-card`);
  await expect(cards).toHaveCount(2);
  for (const card of await cards.all()) {
    if (!(await card.getAttribute('class'))?.includes('jp-mod-on')) {
      await card.locator('.jp-Tuft-runName').click();
    }
  }
  const use = page.locator(`${PANEL} .jp-Tuft-workers tr`, {
    hasText: 'Run 2'
  });
  await expect(use).toContainText(/\d (kB|MB)/);
  await page.locator(`${PANEL} >> text=Enlarge`).click();
  const chips = page.locator(`${VIEW} .jp-Tuft-chip`);
  await expect(chips).toHaveCount(2);
  await expect(page.locator(`${VIEW} canvas`)).toBeVisible();

  const seen = new Set<string>();
  for (const [name, theme] of Object.entries(THEMES)) {
    await page.theme.setTheme(theme);
    await expect.poll(() => contrast(page, PANEL)).toBeGreaterThan(3);
    await expect.poll(() => contrast(page, VIEW)).toBeGreaterThan(3);
    const own = async () => !seen.has(await picture(page, VIEW));
    await expect.poll(own, 'each theme draws in its own colours').toBe(true);
    seen.add(await picture(page, VIEW));
    const folder = process.env.TUFT_SCREENSHOTS!;
    await page.screenshot({ path: `${folder}/galata-${name}.png` });
  }
  await page.notebook.activate(NOTEBOOK);
  await page.locator(WIDGET).first().scrollIntoViewIfNeeded();
  await expect.poll(() => contrast(page, WIDGET)).toBeGreaterThan(3);
});
