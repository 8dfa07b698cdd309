/**
 * Galata, JupyterLab's own harness, against the server that tests/browser/test_galata.py started.
 *
 * The token travels in a header, so that the server keeps its authentication; the browser is the one of the system.
 */
export default {
  testDir: __dirname,
  outputDir: process.env.GALATA_OUTPUT,
  workers: 1,
  reporter: [['list']],
  timeout: 480000,
  expect: { timeout: 150000 },
  use: {
    baseURL: process.env.TARGET_URL,
    extraHTTPHeaders: { Authorization: `token ${process.env.JUPYTER_TOKEN}` },
    viewport: { width: 1280, height: 860 },
    launchOptions: {
      executablePath: process.env.CHROMIUM,
      args: process.env.CHROMIUM_FLAGS!.split(' ')
    }
  }
};
